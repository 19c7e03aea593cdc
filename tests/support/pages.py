"""Tables that a command keeps on a page of this repository, such as RELIABILITY.md and BENCHMARKS.md."""

import os
import platform
from pathlib import Path

import psutil

ROOT = Path(__file__).parent.parent.parent


def put(section: str, text: str, page: Path) -> None:
    """Replace the text between a section's two marks; the rest of the page stays as it is.

    Raises ValueError if the page does not have the marks.
    """
    begin, end = f"<!-- {section}: begin -->", f"<!-- {section}: end -->"
    before, found_begin, rest = page.read_text().partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end:
        raise ValueError(f"{page.name} needs the lines {begin} and {end}")
    page.write_text(f"{before}{begin}\n{text.strip()}\n{end}{after}")


def machine() -> str:
    """The machine that a table was made on, in one line."""
    memory = psutil.virtual_memory().total / 2**30
    system = f"{platform.system()} {platform.release()}"
    return f"{os.cpu_count()} cores of {_cpu()}, {memory:.0f} GiB, {system}, Python {platform.python_version()}"


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
