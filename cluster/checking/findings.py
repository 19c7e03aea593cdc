"""The result of a check: its findings and its models, also as JSON."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

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
    """One model: a value that clients may send as ``model``."""

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


class CheckFailed(ClusterError):
    """A file has errors and cannot be deployed; ``report`` has all of them."""

    def __init__(self, report: CheckReport) -> None:
        super().__init__("\n".join(f"{report.path}: {finding}" for finding in report.errors))
        self.report = report


def show_price(price: Price) -> str:
    """A price in US dollars in one line; token rates are per million tokens."""
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
