"""How many replicas there should be, by what runs and what waits."""

import ast
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from deployments.autoscaling import QUEUED, replicas_for


@dataclass
class Load:
    current_num_replicas: int
    total_num_requests: float
    aggregated_metrics: dict[str, dict[object, float]] | None = field(default=None)


@pytest.mark.parametrize(
    ("replicas", "requests", "queued", "wanted"),
    [
        (1, 0, 0, 0),
        (1, 1, 0, 1),
        (1, 16, 0, 1),
        (1, 17, 0, 2),
        (2, 64, 0, 4),
        (1, 16, 14, 1),
        (1, 16, 15, 2),
        (2, 16, 15, 1),
        (2, 16, 29, 3),
    ],
)
def test_replicas_follow_requests_and_engine_queues(replicas: int, requests: int, queued: int, wanted: int) -> None:
    load = Load(replicas, requests, {QUEUED: {"a": queued}})
    assert replicas_for(load)[0] == wanted


def test_without_reports_the_requests_decide() -> None:
    assert replicas_for(Load(1, 40))[0] == 3


def test_the_policy_imports_nothing_that_serves_controller_lacks(repo: Path) -> None:
    command = "import sys; before = set(sys.modules); import deployments.autoscaling; print(set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", command], cwd=repo, capture_output=True, text=True, check=True)
    assert (
        not {name.split(".")[0] for name in ast.literal_eval(done.stdout)}
        - set(sys.stdlib_module_names)
        - {"deployments"}
    )
