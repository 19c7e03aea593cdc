"""The table of all scenarios in RELIABILITY.md: its rows, and how it is written."""

from collections.abc import Sequence
from dataclasses import astuple, dataclass

HEAD = ("scenario", "tries", "lost", "doubled", "difference (nanos)")


@dataclass(frozen=True)
class Row:
    """The result of one scenario. ``tries`` counts its faults, or its operations where it injects none."""

    name: str
    tries: int
    lost: int
    """What was acknowledged to a client or by Dodo and is not in the books, and replies that did not come in time."""
    doubled: int
    """What is in the books more than once, or was granted to more than one client."""
    difference_nanos: int
    """The sum of the absolute differences between books that must be equal."""

    @property
    def is_clean(self) -> bool:
        return self.tries > 0 and not (self.lost or self.doubled or self.difference_nanos)


def markdown(rows: Sequence[Row]) -> str:
    """A Markdown table with aligned columns."""
    cells = [HEAD, *(tuple(f"{value:,}" if isinstance(value, int) else value for value in astuple(r)) for r in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(HEAD))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    first, *rest = (_aligned(line, widths) for line in cells)
    return "\n".join((_bars(first), _bars(rule), *(_bars(line) for line in rest)))


def _aligned(line: Sequence[str], widths: Sequence[int]) -> list[str]:
    return [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]


def _bars(line: Sequence[str]) -> str:
    return f"| {' | '.join(line)} |"
