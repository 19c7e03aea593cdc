"""Numbers of a benchmark: percentiles, medians, tables in BENCHMARKS.md. Knows nothing of what was measured."""

import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from math import ceil
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "BENCHMARKS.md"


@dataclass(frozen=True, slots=True)
class Latency:
    """Half and all but a hundredth of the calls took no longer, in milliseconds."""

    p50: float
    p99: float


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a table. ``reach`` is the figure to reach; ``is_reached`` is ``None`` where there is none."""

    what: str
    measured: str
    reach: str = ""
    is_reached: bool | None = None

    def cells(self) -> tuple[str, str, str, str]:
        verdict = {None: "", True: "yes", False: "**no**"}[self.is_reached]
        return self.what, self.measured, self.reach, verdict


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that so many percent of the values do not exceed."""
    assert values, "nothing was measured"
    assert 0 < percent <= 100, "a percentile lies above 0 and at most at 100"
    return sorted(values)[ceil(len(values) * percent / 100) - 1]


def latency(seconds: Sequence[float]) -> Latency:
    return Latency(percentile(seconds, 50) * 1000, percentile(seconds, 99) * 1000)


def middle(rounds: Sequence[Latency]) -> Latency:
    """The median of each percentile over several rounds."""
    return Latency(median(one.p50 for one in rounds), median(one.p99 for one in rounds))


def at_most(what: str, value: float, limit: float, unit: str = "x", reach: str = "") -> Row:
    """A figure that must not be exceeded."""
    return Row(what, f"{plain(value)} {unit}", reach or f"<= {plain(limit)} {unit}", value <= limit)


def at_least(what: str, value: float, limit: float, unit: str = "x") -> Row:
    return Row(what, f"{plain(value)} {unit}", f">= {plain(limit)} {unit}", value >= limit)


def plain(value: float) -> str:
    """Three digits are what such a measurement is worth."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    rows = [heads, ["---"] * len(heads), *lines]
    assert all(len(row) == len(heads) for row in rows), "every line has a cell for each head"
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def verdicts(rows: Sequence[Row]) -> str:
    return table(("figure", "measured", "to reach", "reached"), [row.cells() for row in rows])


def cpu_s(*pids: int) -> float:
    """CPU seconds that these processes and their threads have used so far; those that are gone count nothing."""
    ticks = 0
    for pid in pids:
        with suppress(FileNotFoundError, ProcessLookupError):
            words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(words[11]) + int(words[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def machine() -> str:
    """Where and when, in one line."""
    with open("/proc/cpuinfo") as cpus:
        names = [line.partition(":")[2].strip() for line in cpus if line.startswith("model name")]
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    when = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    version = ".".join(str(part) for part in sys.version_info[:3])
    cpu = names[0] if names else platform.machine()
    load = os.getloadavg()[0]
    return (
        f"{when}, {_commit()}, {os.cpu_count()} x {cpu}, {memory_gib:.0f} GiB, Python {version}, load before {load:.1f}"
    )


def _commit() -> str:
    asked = ["git", "rev-parse", "--short", "HEAD"]
    done = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=False)
    return f"commit {done.stdout.strip()}" if done.returncode == 0 else "no commit"


def put(section: str, text: str, page: Path = PAGE) -> None:
    """Replace what stands between a section's two markers; all else on the page is kept."""
    begin, end = f"<!-- {section}: begin -->", f"<!-- {section}: end -->"
    whole = page.read_text()
    before, found_begin, rest = whole.partition(begin)
    _, found_end, after = rest.partition(end)
    assert found_begin, f"{page.name} has no line {begin}"
    assert found_end, f"{page.name} has no line {end}"
    page.write_text(f"{before}{begin}\n{text.strip()}\n{end}{after}")
