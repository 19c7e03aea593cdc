"""The dashboard queries only metrics that the code exports."""

import json
import re
from pathlib import Path

import pytest

COUNTER_OR_GAUGE = re.compile(r'(?:Counter|Gauge|Histogram)\(\s*f?"(farebox_[a-z_{}]+)"')
ASKED = re.compile(r"ray_((?:farebox|vllm)_[a-z_]+?)(?:_total|_bucket)?(?=[\[\])\s{]|$)")


def test_dashboard_metrics_are_exported(repo: Path) -> None:
    exported = set()
    for path in (repo / "deployments").rglob("*.py"):
        exported |= set(COUNTER_OR_GAUGE.findall(path.read_text()))
    plain = {name for name in exported if "{" not in name}
    engine = (repo / "deployments" / "replica" / "metrics.py").read_text()
    plain |= set(re.findall(r'^    "((?:farebox|vllm)_[a-z_]+)": \(', engine, re.MULTILINE))
    dashboard = json.loads((repo / "cluster" / "monitoring" / "farebox.json").read_text())
    asked = {
        name for panel in dashboard["panels"] for target in panel["targets"] for name in ASKED.findall(target["expr"])
    }
    assert len(asked) > 10
    assert asked <= plain, sorted(asked - plain)


MONEY = (
    "farebox_ledger_open_holds", "farebox_ledger_oldest_hold_seconds", "farebox_ledger_unsettled_nanos",
    "farebox_billing_unsealed_entries", "farebox_billing_outbox_events", "farebox_billing_backlog_age_seconds",
    "farebox_billing_dead_events", "farebox_billing_withheld_records", "farebox_billing_parked_webhooks",
    "farebox_spool_settles", "farebox_spool_refused_settles", "farebox_quarantine_settles", "farebox_refusals",
    "farebox_reconcile_difference_nanos",
)  # fmt: skip


@pytest.mark.parametrize("name", MONEY)
def test_money_metrics_have_a_panel(repo: Path, name: str) -> None:
    dashboard = json.loads((repo / "cluster" / "monitoring" / "farebox.json").read_text())
    shown = {n for panel in dashboard["panels"] for target in panel["targets"] for n in ASKED.findall(target["expr"])}
    assert name in shown


def test_panels_do_not_overlap(repo: Path) -> None:
    panels = json.loads((repo / "cluster" / "monitoring" / "farebox.json").read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert len({(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}) == len(panels)
