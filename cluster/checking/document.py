"""Reads a YAML file and remembers the line of every value, so that a finding can name it."""

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

Place = tuple[str | int, ...]
"""The path of a value: keys and list positions from the top of the file."""


class Unreadable(Exception):
    """The file cannot be read as YAML. ``line`` counts from 1; 0 if the error has none."""

    def __init__(self, problem: str, line: int = 0) -> None:
        super().__init__(problem, line)
        self.problem, self.line = problem, line

    def __str__(self) -> str:
        return self.problem


@dataclass(frozen=True)
class Document:
    """A parsed file: its values, and their lines."""

    values: Mapping[str, object]
    lines: Mapping[Place, int]
    duplicates: tuple[Place, ...]
    """Keys that a mapping has more than once. YAML keeps the last without an error."""

    def line(self, place: Place) -> int:
        """The line of a value, else of the nearest value around its place; 0 if there is none."""
        for length in range(len(place), -1, -1):
            if line := self.lines.get(place[:length]):
                return line
        return 0


def read_document(path: Path) -> Document:
    """Read a file whose top level is a mapping.

    Raises:
        Unreadable: it does not exist, or is not YAML, or has no mapping at the top.
    """
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except OSError as error:
        raise Unreadable(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise Unreadable(f"{path} is not UTF-8 text") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        message = " ".join(filter(None, (error.context, error.problem)))
        raise Unreadable(f"not YAML: {message}", mark.line + 1 if mark else 0) from error
    except yaml.YAMLError as error:
        raise Unreadable(f"not YAML: {error}") from error
    if not isinstance(values, dict) or node is None:
        raise Unreadable("the file must be a mapping with `applications:` at its top", 1)
    lines: dict[Place, int] = {}
    duplicates = tuple(_visit(node, (), lines))
    return Document(values, lines, duplicates)


def _visit(node: yaml.Node, place: Place, lines: dict[Place, int]) -> Iterator[Place]:
    """Record the line of every value under ``node``; yield the keys that a mapping has more than once."""
    lines.setdefault(place, node.start_mark.line + 1)
    if isinstance(node, yaml.SequenceNode):
        for position, item in enumerate(node.value):
            yield from _visit(item, (*place, position), lines)
    elif isinstance(node, yaml.MappingNode):
        seen: set[Hashable] = set()
        for key, value in node.value:
            here = (*place, str(key.value))
            if key.value in seen and key.value != "<<":
                yield here
            seen.add(str(key.value))
            lines[here] = key.start_mark.line + 1
            yield from _visit(value, here, lines)
