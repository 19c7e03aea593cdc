"""Run the fault scenarios, two at a time, each in a process of its own.

A scenario is a module with ``NAME`` and ``run() -> list[Row]``, which raises AssertionError where a guarantee did not
hold. The rows of all scenarios make one table, printed here and kept in RELIABILITY.md. The exit code is 1 if a
guarantee did not hold; RELIABILITY.md is then left as it is.
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
from tests.chaos.table import Row, markdown
from tests.support.pages import ROOT, machine, put

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
"""Modules of this folder. The longest is first, so that both lanes end at about the same time; ``ledger_machine``,
which keeps two processes busy, comes after it has ended."""
PROMPT = ("store_failover", "store_away")
"""The scenarios that test how soon a call to a silent store is given up. The others wait longer, so that a machine that
stalls does not fail them."""
STORE_PATIENCE_S = 10.0
LANES = 2
LIMIT_S = 780
"""A scenario that takes longer is killed and counts as failed."""
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
    body = f"{markdown(rows)}\n\n`{COMMAND}` in {time.monotonic() - started:.0f} s on {machine()}, no GPU."
    print(body)
    if None in results or not all(row.is_clean for row in rows):
        print("a guarantee did not hold", file=sys.stderr)
        return 1
    if asked.only is None:
        put("chaos", body, PAGE)
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos",
        description="run the fault scenarios, two at a time, and write their table to RELIABILITY.md",
    )
    parser.add_argument("--only", metavar="NAME", help="run one scenario; RELIABILITY.md stays as it is")
    parser.add_argument("--rows", metavar="FILE", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def _name(module: str) -> str:
    return str(importlib.import_module(f"tests.chaos.{module}").NAME)


def _run_here(module: str, out: Path) -> int:
    """Run one scenario in this process and write its rows to a file."""
    if module not in PROMPT:
        guard.SILENCE_S = STORE_PATIENCE_S
    rows: list[Row] = importlib.import_module(f"tests.chaos.{module}").run()
    out.write_text(json.dumps([asdict(row) for row in rows]))
    return 0


def _run_apart(module: str) -> list[Row] | None:
    """Run one scenario in a process of its own; returns its rows, or ``None`` if it failed, which is printed."""
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
