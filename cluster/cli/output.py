"""What commands print: JSON, tables and errors."""

import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from billing.money import format_usd
from cluster.local.launch import Progress

out = Console(markup=False, emoji=False, highlight=False)
err = Console(markup=False, emoji=False, highlight=False, stderr=True)
"""Neither reads markup: names, reasons and errors come from outside and may contain brackets."""

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def print_json(value: object) -> None:
    print(json.dumps(value, indent=2))


def table(*columns: str, right: Collection[str] = (), title: str | None = None) -> Table:
    """An empty table; the columns named in ``right`` are aligned to the right."""
    made = Table(title=title, title_justify="left")
    for name in columns:
        made.add_column(name, justify="right" if name in right else "left", overflow="fold")
    return made


def dollars(nanos: int, decimals: int = 6) -> str:
    return f"${format_usd(nanos, decimals)}"


def utc(at_ms: int) -> str:
    """A time in Unix milliseconds as ``2026-11-23 13:05:00``."""
    return datetime.fromtimestamp(at_ms // 1_000, UTC).strftime("%Y-%m-%d %H:%M:%S")


def fail(reason: str) -> NoReturn:
    """Print an error on stderr and exit with code 1."""
    err.print(Text.assemble(("farebox: ", "bold red"), reason), soft_wrap=True)
    raise typer.Exit(1)


@contextmanager
def steps(console: Console = out) -> Iterator[Progress]:
    """Show the current step in one line that changes; where the output is no terminal, print a line for each step."""
    if not console.is_terminal:
        yield lambda step: console.print(f"· {step}")
        return
    with console.status("") as spinner:
        yield lambda step: spinner.update(step)
