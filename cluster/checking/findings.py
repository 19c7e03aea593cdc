"""The result of a check: its findings, as a table or as JSON."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Group
from rich.table import Table
from rich.text import Text

from billing.money import format_usd
from billing.pricing.prices import Price
from cluster.errors import ClusterError


@dataclass(frozen=True, slots=True)
class Finding:
    """One error or warning."""

    where: str
    """Keys and names from the top of the file, such as ``farebox > Gateway > adapters > pirate > price``."""
    problem: str
    line: int = 0
    """From 1; 0 if the finding is not about a line."""
    is_warning: bool = False

    def __str__(self) -> str:
        at = f"line {self.line}: " if self.line else ""
        return f"{at}{self.where}: {self.problem}" if self.where else f"{at}{self.problem}"


@dataclass(frozen=True, slots=True)
class CheckedModel:
    """One line of the table: a value that clients may send as ``model``."""

    id: str
    path: str
    price: str
    visibility: str
    digest: str = ""
    rank: int = 0
    weight_bytes: int = 0
    problem: str = ""

    @property
    def is_valid(self) -> bool:
        return not self.problem


@dataclass(frozen=True, slots=True)
class CheckReport:
    """The result for one file."""

    path: Path
    findings: tuple[Finding, ...]
    models: tuple[CheckedModel, ...] = ()
    plans: tuple[str, ...] = ()
    packs: tuple[str, ...] = ()

    @property
    def errors(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if not finding.is_warning)

    @property
    def is_valid(self) -> bool:
        """Whether the file can be deployed. Warnings do not prevent that."""
        return not self.errors

    def to_json(self) -> str:
        content = {
            "path": str(self.path),
            "is_right": self.is_valid,
            "findings": [asdict(finding) for finding in self.findings],
            "models": [asdict(model) | {"is_right": model.is_valid} for model in self.models],
            "plans": list(self.plans),
            "packs": list(self.packs),
        }
        return json.dumps(content, indent=2)

    def table(self) -> Group:
        """The models, the findings and the result, for a terminal."""
        parts = [_models_table(self.models)] if self.models else []
        return Group(*parts, *(_line(finding) for finding in self.findings), self._result())

    def _result(self) -> Text:
        if not self.is_valid:
            number = len(self.errors)
            return Text(f"{self.path}: {number} {'error' if number == 1 else 'errors'}", style="bold red")
        content = f"{len(self.models)} models, {len(self.plans)} plans, {len(self.packs)} packs"
        return Text(f"{self.path} is valid: {content}", style="bold green")


class CheckFailed(ClusterError):
    """A file has errors and cannot be deployed; ``report`` has all of them."""

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
            Text(model.id),
            model.digest[:12],
            str(model.rank or ""),
            size,
            Text(model.price),
            Text(model.visibility),
            Text("ok", "green") if model.is_valid else Text("error", "red"),
        )
    return table


def show_price(price: Price) -> str:
    """A price in US dollars for one cell of the table; token rates are per million tokens."""
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
