"""The result of a check as ``farebox check`` prints it."""

from rich.console import Group
from rich.text import Text

from cluster.checking.findings import CheckedModel, CheckReport, Finding
from cluster.cli.output import Table, table


def report_table(report: CheckReport) -> Group:
    """The models, the findings and the result."""
    parts = [_models_table(report.models)] if report.models else []
    return Group(*parts, *(_line(finding) for finding in report.findings), _result(report))


def _result(report: CheckReport) -> Text:
    if not report.is_valid:
        number = len(report.errors)
        return Text(f"{report.path}: {number} {'error' if number == 1 else 'errors'}", style="bold red")
    content = f"{len(report.models)} models, {len(report.plans)} plans, {len(report.packs)} packs"
    return Text(f"{report.path} is valid: {content}", style="bold green")


def _line(finding: Finding) -> Text:
    kind, style = ("warning", "yellow") if finding.is_warning else ("error", "red")
    return Text.assemble((f"{kind} ", style), str(finding))


def _models_table(models: tuple[CheckedModel, ...]) -> Table:
    rows = table("model", "digest", "rank", "size", "price", "open to", "result", right=("rank", "size"))
    for model in models:
        size = f"{model.weight_bytes / 1024**2:.1f} MiB" if model.weight_bytes else ""
        result = Text("ok", "green") if model.is_valid else Text("error", "red")
        cells = (model.id, model.digest[:12], str(model.rank or ""), size, model.price, model.visibility)
        rows.add_row(*cells, result)
    return rows
