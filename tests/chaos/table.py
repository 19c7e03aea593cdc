"""The one table of all scenarios: what a row is, when it is clean, how it looks, where it stands in RELIABILITY.md.

Knows no scenario and runs nothing.
"""

import os
import platform
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

import psutil

HEAD = ("scenario", "tries", "lost", "doubled", "drift (nanos)")
BEGIN, END = "<!-- chaos:begin -->", "<!-- chaos:end -->"


@dataclass(frozen=True)
class Row:
    """One scenario's result. ``tries`` counts its faults, or its operations where it injects none."""

    name: str
    tries: int
    lost: int
    """Acknowledged to a client or by Dodo, and not in the books; or a reply that a law promised and nobody got."""
    doubled: int
    """In the books more often than once, or granted to more than one."""
    drift_nanos: int
    """The sum of all differences between books that must be equal, each taken without its sign."""

    @property
    def is_clean(self) -> bool:
        return self.tries > 0 and not (self.lost or self.doubled or self.drift_nanos)


def markdown(rows: Sequence[Row]) -> str:
    """A table that reads well in a terminal and on a page."""
    cells = [HEAD, *(tuple(f"{value:,}" if isinstance(value, int) else value for value in astuple(r)) for r in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(HEAD))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    first, *rest = (_aligned(line, widths) for line in cells)
    return "\n".join((_bars(first), _bars(rule), *(_bars(line) for line in rest)))


def _aligned(line: Sequence[str], widths: Sequence[int]) -> list[str]:
    return [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]


def _bars(line: Sequence[str]) -> str:
    return f"| {' | '.join(line)} |"


def put_between_marks(page: str, body: str) -> str:
    """The page with ``body`` in place of what stood between its two marks. Raises ValueError where they miss."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page needs the lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{body.strip()}\n{END}{after}"


def machine() -> str:
    """What this table was made on, in a line."""
    memory = psutil.virtual_memory().total / 2**30
    system = f"{platform.system()} {platform.release()}"
    return f"{os.cpu_count()} cores of {_cpu()}, {memory:.0f} GiB, {system}, Python {platform.python_version()}, no GPU"


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()
