"""What commands print: JSON, tables, fields and errors.

Nothing is ever cut. In a pipe a row of a table is one line. In a terminal that is too narrow for a table its columns
of prose are folded between words; if that is not enough, each row is shown as a list of fields. A line that is wider
than the terminal is continued by the terminal itself, so that what it shows can be copied whole.
"""

import json
import os
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Annotated, NoReturn

import rich.table
import typer
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.panel import Panel
from rich.text import Text

from billing.money import format_usd
from cluster.local.launch import Progress

out = Console(markup=False, emoji=False, highlight=False, soft_wrap=True)
err = Console(markup=False, emoji=False, highlight=False, soft_wrap=True, stderr=True)
"""Neither reads markup: names, reasons and errors come from outside and may contain brackets."""

PROSE_MIN = 24
"""A column of prose is folded to no fewer characters."""
GAP = "  "
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")
"""What would break a line, or command a terminal."""

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def print_json(value: object) -> None:
    print(json.dumps(value, indent=2))


class Table(rich.table.Table):
    """A table of which no cell is ever cut. Every cell is one line of text."""

    def add_row(self, *cells: object, style: object = None, end_section: bool = False) -> None:
        texts = [one_line(cell) if isinstance(cell, Text) else one_line(Text(str(cell))) for cell in cells]
        missing = [Text()] * (len(self.columns) - len(texts))
        super().add_row(*texts, *missing, style=str(style or ""), end_section=end_section)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if not _is_terminal(console):
            yield from self._annotated(self._lines())
        elif not self.rows:
            yield from self._annotated(iter((Text("none"),)))
        elif self._least_width() <= options.max_width:
            yield from super().__rich_console__(console, options)
        else:
            yield from self._annotated(self._records(console, options.max_width))

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(1, options.max_width)

    def _annotated(self, body: Iterator[Text | Group]) -> Iterator[Text | Group]:
        if self.title:
            yield whole(Text(str(self.title)))
        yield from body
        if self.caption:
            yield whole(Text(str(self.caption)))

    def _texts(self) -> list[list[Text]]:
        """The cells of each row."""
        columns = [[cell for cell in column.cells if isinstance(cell, Text)] for column in self.columns]
        return [list(row) for row in zip(*columns, strict=True)]

    def _widths(self) -> list[int]:
        return [
            max(cell_len(text) for text in (str(column.header), *map(str, column.cells))) for column in self.columns
        ]

    def _least_width(self) -> int:
        """The width at which columns of prose can be folded no further."""
        prose = [column for column in self.columns if not column.no_wrap]
        words = [word for column in prose for cell in column.cells for word in str(cell).split()]
        least = max([PROSE_MIN, *map(cell_len, words)])
        widths = [
            width if column.no_wrap else min(width, least)
            for column, width in zip(self.columns, self._widths(), strict=True)
        ]
        padding = 2 * len(widths)
        return sum(widths) + padding + self._extra_width

    def _lines(self) -> Iterator[Text]:
        """One line for each row."""
        widths = self._widths()
        is_right = [column.justify == "right" for column in self.columns]
        for row in [[Text(str(column.header)) for column in self.columns], *self._texts()]:
            cells = []
            for cell, width, right in zip(row, widths, is_right, strict=True):
                padding = " " * (width - cell_len(cell.plain))
                cells.append(padding + cell.plain if right else cell.plain + padding)
            yield whole(Text(GAP.join(cells).rstrip()))

    def _records(self, console: Console, width: int) -> Iterator[Text | Group]:
        """Each row as a list of its fields, without the empty ones."""
        for number, (row, cells) in enumerate(zip(self.rows, self._texts(), strict=True)):
            if number:
                yield Text()
            named = zip(self.columns, cells, strict=True)
            filled = [(str(column.header), cell, not column.no_wrap) for column, cell in named if cell.plain]
            longest = max((cell_len(name) for name, _, _ in filled), default=0)
            for name, cell, is_prose in filled:
                cell = cell.copy()
                cell.stylize(row.style or "")
                room = width - longest - len(GAP)
                parts = cell.wrap(console, room) if is_prose and _fits_in_words(cell, room) else [cell]
                for index, part in enumerate(parts):
                    yield _field(name if index == 0 else "", part, longest)


def one_line(text: Text) -> Text:
    """The text with a space for each run of control characters, such as a line break in a name."""
    return Text(_CONTROL.sub(" ", text.plain), text.style) if _CONTROL.search(text.plain) else text


def _is_terminal(console: Console) -> bool:
    """Whether the output is a terminal, whose lines have a width. ``FORCE_COLOR`` makes no terminal of a pipe."""
    return console.is_terminal and (console.file.isatty() or os.environ.get("TTY_COMPATIBLE") == "1")


def _fits_in_words(text: Text, width: int) -> bool:
    return all(cell_len(word) <= width for word in text.plain.split())


def whole(text: Text) -> Text:
    """The text, which is neither cut nor folded when it is printed."""
    text.no_wrap, text.overflow = True, "ignore"
    return text


def _field(name: str, value: Text, width: int) -> Text:
    padding = " " * (width - cell_len(name)) + GAP
    return whole(Text.assemble((name, "bold"), padding, value))


def table(*columns: str, right: Collection[str] = (), prose: Collection[str] = (), title: str | None = None) -> Table:
    """An empty table.

    The columns named in ``right`` are aligned to the right. Those named in ``prose`` may be folded between words in a
    narrow terminal; a cell of any other column, such as an id, a sum or a date, always stays on one line.
    """
    made = Table(title=title, title_justify="left")
    for name in columns:
        made.add_column(name, justify="right" if name in right else "left", overflow="fold", no_wrap=name not in prose)
    return made


def fields(pairs: Iterable[tuple[str, str | Text]]) -> Group:
    """A list of names with their values, one a line."""
    named = [(name, one_line(value if isinstance(value, Text) else Text(value))) for name, value in pairs]
    longest = max((cell_len(name) for name, _ in named), default=0)
    return Group(*(_field(name, value, longest) for name, value in named))


def panel(console: Console, title: str, pairs: Sequence[tuple[str, str]]) -> RenderableType:
    """The same in a frame, but where the terminal is too narrow for it."""
    shown = fields(pairs)
    width = 4 + max(cell_len(name) for name, _ in pairs) + len(GAP) + max(cell_len(value) for _, value in pairs)
    if _is_terminal(console) and width > console.width:
        return Group(Text(title, "bold"), shown)
    return Panel(shown, title=title, title_align="left", width=width)


def dollars(nanos: int, decimals: int = 6) -> str:
    return f"{'-' if nanos < 0 else ''}${format_usd(abs(nanos), decimals)}"


def utc(at_ms: int) -> str:
    """A time in Unix milliseconds as ``2026-11-23 13:05:00``."""
    return datetime.fromtimestamp(at_ms // 1_000, UTC).strftime("%Y-%m-%d %H:%M:%S")


def fail(reason: str) -> NoReturn:
    """Print an error on stderr and exit with code 1."""
    err.print(Text.assemble(("farebox: ", "bold red"), reason))
    raise typer.Exit(1)


@contextmanager
def steps(console: Console = out) -> Iterator[Progress]:
    """Show the current step in one line that changes; where the output is no terminal, print a line for each step."""
    if not console.is_terminal:
        yield lambda step: console.print(f"· {step}")
        return
    with console.status("") as spinner:
        yield lambda step: spinner.update(step)
