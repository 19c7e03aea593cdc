"""A YAML file with the line of everything in it, so that a finding can say where.

Knows YAML's syntax and its traps (a key written twice, a tab); knows no configuration.
"""

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

Place = tuple[str | int, ...]
"""Keys and list positions from the top of the file to a value."""


class Unreadable(Exception):
    """The file is not YAML that can be read; ``line`` counts from 1, 0 where there is none."""

    def __init__(self, problem: str, line: int = 0) -> None:
        super().__init__(problem, line)
        self.problem, self.line = problem, line

    def __str__(self) -> str:
        return self.problem


@dataclass(frozen=True)
class Document:
    """A parsed file: plain values, and where each of them stands."""

    values: Mapping[str, object]
    lines: Mapping[Place, int]
    twice: tuple[Place, ...]
    """Keys that stand more than once in one mapping: YAML silently keeps the last."""

    def line(self, place: Place) -> int:
        """The line of a value, or of what it would stand in; 0 if nothing is known."""
        for length in range(len(place), -1, -1):
            if line := self.lines.get(place[:length]):
                return line
        return 0


def read_document(path: Path) -> Document:
    """Read a file whose top level is a mapping.

    Raises:
        Unreadable: no such file, no YAML, or something else at its top.
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
        said = " ".join(filter(None, (error.context, error.problem)))
        raise Unreadable(f"not YAML: {said}", mark.line + 1 if mark else 0) from error
    except yaml.YAMLError as error:
        raise Unreadable(f"not YAML: {error}") from error
    if not isinstance(values, dict) or node is None:
        raise Unreadable("the file must be a mapping with `applications:` at its top", 1)
    lines: dict[Place, int] = {}
    twice = tuple(_visit(node, (), lines))
    return Document(values, lines, twice)


def _visit(node: yaml.Node, place: Place, lines: dict[Place, int]) -> Iterator[Place]:
    """Note the line of every value under ``node``; yield the keys that are written twice."""
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
