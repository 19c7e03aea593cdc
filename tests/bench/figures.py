"""The figures of a benchmark: percentiles, medians, and the tables in BENCHMARKS.md."""

import os
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from math import ceil
from pathlib import Path
from statistics import median

from tests.support import pages
from tests.support.pages import ROOT

PAGE = ROOT / "BENCHMARKS.md"


@dataclass(frozen=True, slots=True)
class Latency:
    """The 50th and the 99th percentile, in milliseconds."""

    p50: float
    p99: float


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a table. ``reach`` is the target, and ``is_reached`` is ``None`` where there is no target."""

    what: str
    measured: str
    reach: str = ""
    is_reached: bool | None = None

    def cells(self) -> tuple[str, str, str, str]:
        verdict = {None: "", True: "yes", False: "**no**"}[self.is_reached]
        return self.what, self.measured, self.reach, verdict


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest of the values that at least ``percent`` percent of them do not exceed."""
    assert values, "a percentile of no values"
    assert 0 < percent <= 100, "a percentile lies above 0 and at most at 100"
    return sorted(values)[ceil(len(values) * percent / 100) - 1]


def latency(seconds: Sequence[float]) -> Latency:
    return Latency(percentile(seconds, 50) * 1000, percentile(seconds, 99) * 1000)


def middle(rounds: Sequence[Latency]) -> Latency:
    """The median of each percentile over several rounds."""
    return Latency(median(one.p50 for one in rounds), median(one.p99 for one in rounds))


def at_most(what: str, value: float, limit: float, unit: str = "x", reach: str = "") -> Row:
    """A row whose target is an upper limit."""
    return Row(what, f"{plain(value)} {unit}", reach or f"<= {plain(limit)} {unit}", value <= limit)


def at_least(what: str, value: float, limit: float, unit: str = "x") -> Row:
    """A row whose target is a lower limit."""
    return Row(what, f"{plain(value)} {unit}", f">= {plain(limit)} {unit}", value >= limit)


def plain(value: float) -> str:
    """The value with three significant digits; a measurement is no more exact than that."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    rows = [heads, ["---"] * len(heads), *lines]
    assert all(len(row) == len(heads) for row in rows), "every line has a cell for each head"
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def verdicts(rows: Sequence[Row]) -> str:
    return table(("figure", "measured", "to reach", "reached"), [row.cells() for row in rows])


def cpu_s(*pids: int) -> float:
    """CPU seconds that these processes have used so far. A process that has ended counts as 0."""
    ticks = 0
    for pid in pids:
        with suppress(FileNotFoundError, ProcessLookupError):
            words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(words[11]) + int(words[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def machine() -> str:
    """When, on which commit and on which machine the figures were measured, in one line."""
    when = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return f"{when}, {_commit()}, {pages.machine()}, load before {os.getloadavg()[0]:.1f}"


def _commit() -> str:
    asked = ["git", "rev-parse", "--short", "HEAD"]
    done = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=False)
    return f"commit {done.stdout.strip()}" if done.returncode == 0 else "no commit"


def put(section: str, text: str, page: Path = PAGE) -> None:
    """Replace the text of a section of BENCHMARKS.md."""
    pages.put(section, text, page)
