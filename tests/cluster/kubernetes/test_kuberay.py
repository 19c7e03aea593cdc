"""The Kubernetes manifest, compared with the shipped configuration."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.config import AutoscalingConfig
from typer.testing import CliRunner

from cluster.cli.main import app
from deployments.config import BillingArgs, FareboxArgs, GatewayUserConfig

Tree = Any  # what YAML holds


@pytest.fixture
def laptop(repo: Path) -> dict[str, Tree]:
    return dict(yaml.safe_load((repo / "serve_config.yaml").read_text()))


@pytest.fixture
def kubernetes(repo: Path) -> dict[str, Tree]:
    manifest = yaml.safe_load((repo / "cluster" / "kubernetes" / "rayservice.yaml").read_text())
    return dict(yaml.safe_load(manifest["spec"]["serveConfigV2"]))


@pytest.fixture
def worker(repo: Path) -> dict[str, Tree]:
    manifest = yaml.safe_load((repo / "cluster" / "kubernetes" / "rayservice.yaml").read_text())
    return dict(manifest["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["template"]["spec"])


def test_spool_volume_is_writable(worker: dict[str, Tree], kubernetes: dict[str, Tree]) -> None:
    spool = kubernetes["applications"][0]["args"]["spool_dir"]
    (owner,), (container,) = worker["initContainers"], worker["containers"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert spool.startswith(mounts["spool"] + "/")
    assert {"name": "spool", "mountPath": mounts["spool"]} in owner["volumeMounts"]
    assert owner["securityContext"]["runAsUser"] == 0
    assert f"mkdir -p {spool} && chown -R ray:users {mounts['spool']}" in owner["command"]


def test_image_builds_as_its_user(repo: Path) -> None:
    lines = (repo / "cluster" / "kubernetes" / "Dockerfile").read_text().splitlines()
    made, entered = lines.index("RUN install -d -o ray -g users /opt/farebox"), lines.index("WORKDIR /opt/farebox")
    users = [line for line in lines if line.startswith("USER")]
    assert made < entered
    assert users[-1] == "USER ray"


def test_manifest_commands_exist(repo: Path) -> None:
    text = (repo / "cluster" / "kubernetes" / "rayservice.yaml").read_text()
    output = CliRunner().invoke(app, ["check", "--help"], env={"COLUMNS": "200"}).output
    assert "farebox check --resolved" in text
    assert "--resolved" in re.sub("\x1b\\[[0-9;]*m", "", output)


def shape(tree: Tree, depth: int) -> Tree:
    """The keys down to ``depth``, without values, which must be the same in both files."""
    if isinstance(tree, dict):
        return {key: shape(value, depth - 1) if depth else None for key, value in tree.items()}
    if isinstance(tree, list) and tree and isinstance(tree[0], dict) and "name" in tree[0]:
        return {str(entry["name"]): shape(entry, depth) for entry in tree if isinstance(entry, dict)}
    return None


def test_both_configurations_have_the_same_parts(laptop: dict[str, Tree], kubernetes: dict[str, Tree]) -> None:
    replica = kubernetes["applications"][0]["deployments"][1]
    assert replica["ray_actor_options"].pop("num_gpus") == 1, "the one key that a laptop lacks"
    assert shape(laptop["applications"], 3) == shape(kubernetes["applications"], 3)


def test_kubernetes_configuration_is_valid(kubernetes: dict[str, Tree]) -> None:
    farebox, billing = kubernetes["applications"]
    FareboxArgs.model_validate(farebox["args"])
    BillingArgs.model_validate(billing["args"])
    gateway = next(d for d in farebox["deployments"] if d["name"] == "Gateway")
    GatewayUserConfig.model_validate(gateway["user_config"])


def test_replicas_scale_before_the_batch_is_full(laptop: dict[str, Tree], kubernetes: dict[str, Tree]) -> None:
    """Ray's open calls must fit all requests of an engine; Ray's own queue is not part of the autoscaling metric."""
    for config in (laptop, kubernetes):
        engine, replica = config["applications"][0]["args"]["engine"], config["applications"][0]["deployments"][1]
        scaling = AutoscalingConfig.model_validate(replica["autoscaling_config"])
        assert scaling.policy.policy_function == "deployments.autoscaling:QueuedTokens"
        target = scaling.policy.policy_kwargs["target_queued_tokens"]
        assert target < engine["max_running"] * engine["max_context_tokens"]
        assert replica["max_ongoing_requests"] >= engine["max_running"] + engine["max_queued"]


def test_both_configurations_have_the_same_plan_kinds(laptop: dict[str, Tree], kubernetes: dict[str, Tree]) -> None:
    def kinds(config: dict[str, Tree]) -> dict[str, str]:
        gateway = config["applications"][0]["deployments"][0]
        return {name: plan["kind"] for name, plan in gateway["user_config"]["plans"].items()}

    assert kinds(laptop) == kinds(kubernetes)
