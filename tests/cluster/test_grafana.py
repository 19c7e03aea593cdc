"""The dashboard asks only for metrics that the code exports."""

import json
import re
from pathlib import Path

COUNTER_OR_GAUGE = re.compile(r'(?:Counter|Gauge|Histogram)\(\s*f?"(farebox_[a-z_{}]+)"')
ASKED = re.compile(r"ray_(farebox_[a-z_]+?)(?:_total|_bucket)?(?=[\[\])\s{]|$)")


def test_every_metric_on_the_dashboard_is_exported(repo: Path) -> None:
    exported = set()
    for path in (repo / "deployments").rglob("*.py"):
        exported |= set(COUNTER_OR_GAUGE.findall(path.read_text()))
    plain = {name for name in exported if "{" not in name}
    engine = set(re.findall(r'^    "([a-z_]+)": "', (repo / "deployments" / "metrics.py").read_text(), re.MULTILINE))
    plain |= {f"farebox_engine_{name}" for name in engine}
    dashboard = json.loads((repo / "cluster" / "grafana" / "farebox.json").read_text())
    asked = {
        name for panel in dashboard["panels"] for target in panel["targets"] for name in ASKED.findall(target["expr"])
    }
    assert len(asked) > 10
    assert asked <= plain, sorted(asked - plain)
