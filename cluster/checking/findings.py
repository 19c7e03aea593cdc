"""What a check found, for people as a table and for programs as JSON.

Knows how to show it; finds nothing itself.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from billing.money import format_usd
from billing.pricing.prices import Price


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing to put right, or to know."""

    where: str
    """Names from the top of the file, such as ``farebox > Gateway > adapters > pirate > price``."""
    problem: str
    line: int = 0
    """In the file, from 1; 0 where it concerns no line."""
    is_warning: bool = False

    def __str__(self) -> str:
        at = f"line {self.line}: " if self.line else ""
        return f"{at}{self.where}: {self.problem}" if self.where else f"{at}{self.problem}"


@dataclass(frozen=True, slots=True)
class CheckedModel:
    """One line of the table: something that clients may name as ``model``."""

    id: str
    path: str
    price: str
    visibility: str
    digest: str = ""
    rank: int = 0
    weight_bytes: int = 0
    problem: str = ""

    @property
    def is_right(self) -> bool:
        return not self.problem


@dataclass(frozen=True, slots=True)
class CheckReport:
    """All that is to say about one ``serve_config.yaml``."""

    path: Path
    findings: tuple[Finding, ...]
    models: tuple[CheckedModel, ...] = ()
    plans: tuple[str, ...] = ()
    packs: tuple[str, ...] = ()

    @property
    def errors(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if not finding.is_warning)

    @property
    def is_right(self) -> bool:
        """May it be deployed? Warnings do not stand in the way."""
        return not self.errors

    def to_json(self) -> str:
        content = {
            "path": str(self.path),
            "is_right": self.is_right,
            "findings": [asdict(finding) for finding in self.findings],
            "models": [asdict(model) | {"is_right": model.is_right} for model in self.models],
            "plans": list(self.plans),
            "packs": list(self.packs),
        }
        return json.dumps(content, indent=2)

    def table(self) -> Group:
        """For a terminal: models, then what was found, then the verdict."""
        parts = [_models_table(self.models)] if self.models else []
        return Group(*parts, *(_line(finding) for finding in self.findings), self._verdict())

    def _verdict(self) -> Text:
        if not self.is_right:
            number = len(self.errors)
            return Text(f"{self.path}: {number} {'thing' if number == 1 else 'things'} to put right", style="bold red")
        sells = f"{len(self.models)} models, {len(self.plans)} plans, {len(self.packs)} packs"
        return Text(f"{self.path} is right: {sells}", style="bold green")


class CheckFailed(Exception):
    """A file that may not be deployed; ``report`` has every finding."""

    def __init__(self, report: CheckReport) -> None:
        super().__init__("\n".join(f"{report.path}: {finding}" for finding in report.errors))
        self.report = report


def _line(finding: Finding) -> Text:
    kind, style = ("warning", "yellow") if finding.is_warning else ("error", "red")
    return Text.assemble((f"{kind} ", style), str(finding))


def _models_table(models: tuple[CheckedModel, ...]) -> Table:
    table = Table("model", "digest", "rank", "size", "price", "open to", "", box=None, pad_edge=False)
    for model in models:
        size = f"{model.weight_bytes / 1024**2:.1f} MiB" if model.weight_bytes else ""
        table.add_row(
            escape(model.id),
            model.digest[:12],
            str(model.rank or ""),
            size,
            escape(model.price),
            escape(model.visibility),
            "[green]ok[/]" if model.is_right else "[red]refused[/]",
        )
    return table


def show_price(price: Price) -> str:
    """A price in one cell, in dollars; token rates are per million."""
    if price.free:
        return "free"
    rates = (
        ("in", price.input_per_1m),
        ("cached", price.cached_input_per_1m),
        ("out", price.output_per_1m),
        ("request", price.per_request),
        ("second", price.per_compute_second),
    )
    return ", ".join(f"{name} ${format_usd(rate, decimals=2)}" for name, rate in rates if rate)
