"""Runs the fault scenarios, two at a time, each in a process of its own: ``python -m tests.chaos [--only NAME]``.

A scenario is a module with ``NAME`` and ``run() -> list[Row]``, which raises AssertionError where a law broke. All of
them end in one table, on the screen and in RELIABILITY.md. Exit code 1 when any law broke: then no page is changed.
"""

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from billing.store import guard
from tests.chaos.table import Row, machine, markdown, put_between_marks

SCENARIOS: tuple[str, ...] = (
    "whole_stack",
    "gateway_kills",
    "limits",
    "races",
    "dodo_faults",
    "webhooks",
    "billing_kills",
    "ledger_machine",
    "store_shapes",
    "store_kills",
    "power_loss",
    "store_failover",
    "store_away",
)
"""Modules of this folder. The longest is first, so that the two lanes end together; the one with two busy processes
of its own comes late, when that one is over."""
PROMPT = ("store_failover", "store_away")
"""Those that show how soon a silent store is given up. To the others a machine that stalls is no fault of the store."""
STORE_PATIENCE_S = 10.0
LANES = 2
LIMIT_S = 780
"""A scenario that runs longer is ended, and has failed."""
ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "RELIABILITY.md"
COMMAND = "make chaos"


def main(argv: Sequence[str] | None = None) -> int:
    asked = _parse(argv)
    if asked.rows:
        return _run_here(asked.only, Path(asked.rows))
    modules = [module for module in SCENARIOS if asked.only in (None, module, _name(module))]
    if not modules:
        print(f"no scenario is called {asked.only!r}; there are: {', '.join(map(_name, SCENARIOS))}", file=sys.stderr)
        return 2
    started = time.monotonic()
    with ThreadPoolExecutor(LANES) as lanes:
        results = list(lanes.map(_run_apart, modules))
    rows = [row for found in results if found is not None for row in found]
    body = f"{markdown(rows)}\n\n`{COMMAND}` in {time.monotonic() - started:.0f} s on {machine()}."
    print(body)
    if None in results or not all(row.is_clean for row in rows):
        print("a law broke", file=sys.stderr)
        return 1
    if asked.only is None:
        PAGE.write_text(put_between_marks(PAGE.read_text(), body))
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--only", metavar="NAME", help="run one scenario; RELIABILITY.md stays as it is")
    parser.add_argument("--rows", metavar="FILE", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def _name(module: str) -> str:
    return str(importlib.import_module(f"tests.chaos.{module}").NAME)


def _run_here(module: str, out: Path) -> int:
    """A lane's process: one scenario in its main thread, its rows in a file."""
    if module not in PROMPT:
        guard.SILENCE_S = STORE_PATIENCE_S
    rows: list[Row] = importlib.import_module(f"tests.chaos.{module}").run()
    out.write_text(json.dumps([asdict(row) for row in rows]))
    return 0


def _run_apart(module: str) -> list[Row] | None:
    """Rows of a scenario, or ``None`` where it failed: its output then says why."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="chaos") as folder:
        out = Path(folder) / "rows.json"
        command = [sys.executable, "-m", "tests.chaos", "--only", module, "--rows", str(out)]
        log, is_done = _call(command)
        rows = [Row(**raw) for raw in json.loads(out.read_text())] if is_done else None
    is_clean = rows is not None and all(row.is_clean for row in rows)
    word = ("ok" if rows else f"skipped\n{log}") if is_clean else f"FAILED\n{log}"
    print(f"{module}: {word} ({time.monotonic() - started:.0f} s)", file=sys.stderr, flush=True)
    return rows


def _call(command: Sequence[str]) -> tuple[str, bool]:
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=pipe, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        log, _ = process.communicate(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        log, _ = process.communicate()
        return f"{log}\nended after {LIMIT_S} s", False
    return log, process.returncode == 0


if __name__ == "__main__":
    sys.exit(main())
