"""Brings a configuration into force on a running cluster, and says when it is or why it is not.

Knows Serve's REST API, the API's readiness and the catalog that each gateway announces.
Starts no process.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import TypedDict

import httpx
import yaml

from billing.store.connection import Durability
from cluster.local.settings import LOOPBACK, Settings
from cluster.serve_api import (
    DEPLOY_FAILED,
    GATEWAY,
    REPLICA,
    RUNNING,
    Application,
    Deployment,
    ServeApi,
    ServeConfig,
    ServeUnavailable,
)

HEALTHY_TIMEOUT_S = 180.0
_POLL_S = 0.25

Say = Callable[[str], None]


class LaunchError(Exception):
    """What was asked for is not in force; the message holds the cause as Serve or a replica told it."""


def addressed(config: ServeConfig, settings: Settings) -> ServeConfig:
    """The configuration with this machine's own host and port: options go before the file."""
    changed = deepcopy(config)
    http = changed.setdefault("http_options", {})
    http["host"], http["port"] = LOOPBACK, settings.api_port
    changed["proxy_location"] = "HeadOnly"
    return changed


def refuse_losses(config: ServeConfig, running: Mapping[str, Application]) -> None:
    """Serve ends every application that a new configuration lacks: refuse such a file.

    Raises:
        LaunchError: it lacks one.
    """
    lost = sorted(set(running) - {str(app["name"]) for app in config["applications"]})
    if lost:
        raise LaunchError(
            f"the cluster runs {', '.join(lost)}, which this file lacks: applying it would end that. "
            "Add it to the file, or start anew with `farebox down` and `farebox up`"
        )


def wait_healthy(api: ServeApi, api_url: str, say: Say, timeout_s: float = HEALTHY_TIMEOUT_S) -> None:
    """Wait until every application runs and the API says that it is ready.

    Raises:
        LaunchError: an application failed, or the time is over; with the replica's own error.
    """
    deadline = time.monotonic() + timeout_s
    told = ""
    while True:
        found = api.applications()
        failed = [app for app in found.values() if app.status == DEPLOY_FAILED]
        if failed:
            raise LaunchError("\n".join(f"{app.name} does not start.\n{app.problem}" for app in failed))
        if found and all(app.status == RUNNING for app in found.values()) and _is_ready(api_url):
            return
        if (now := _progress(found)) != told:
            say(told := now)
        if time.monotonic() > deadline:
            problems = "\n".join(filter(None, (app.problem for app in found.values())))
            raise LaunchError(
                f"not healthy after {timeout_s:g} s: {now}; `farebox logs` shows why\n{problems}".rstrip()
            )
        time.sleep(_POLL_S)


def user_config(config: ServeConfig) -> Mapping[str, object]:
    """The Gateway's ``user_config``: adapters, prices, plans and packs."""
    found = _deployment(config, GATEWAY).get("user_config") or {}
    assert isinstance(found, dict)
    return found


class StoreTerms(TypedDict):
    """What a configuration asks of its store, as ``connect`` takes it."""

    durability: Durability
    min_replicas_acked: int


def store_terms(config: object) -> StoreTerms:
    """``strict`` and no replicas, unless an application says otherwise."""
    asked = list(_args(config))
    replicas = [n for args in asked if isinstance(n := args.get("min_replicas_acked"), int)]
    is_trusted = any(args.get("durability") == "trusted" for args in asked)
    return StoreTerms(durability="trusted" if is_trusted else "strict", min_replicas_acked=max(replicas, default=0))


def store_terms_in(file: Path) -> StoreTerms:
    """The same of a file that was not checked yet, or cannot be read."""
    try:
        return store_terms(yaml.safe_load(file.read_text()))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return store_terms(None)


def _args(config: object) -> Iterator[Mapping[str, object]]:
    listed = config.get("applications") if isinstance(config, Mapping) else None
    for app in listed if isinstance(listed, list) else []:
        args = app.get("args") if isinstance(app, Mapping) else None
        if isinstance(args, Mapping):
            yield args


def scaled(config: ServeConfig, replicas: int) -> ServeConfig:
    """The configuration with exactly this many LoRA replicas."""
    changed = deepcopy(config)
    deployment = _deployment(changed, REPLICA)
    if "autoscaling_config" in deployment:
        bounds = {"min_replicas": replicas, "max_replicas": replicas, "initial_replicas": replicas}
        deployment["autoscaling_config"] = deployment["autoscaling_config"] | bounds
    else:
        deployment["num_replicas"] = replicas
    return changed


def wait_scaled(api: ServeApi, replicas: int | None, say: Say, timeout_s: float = HEALTHY_TIMEOUT_S) -> int:
    """Wait until as many LoRA replicas run as were asked for; ``None`` takes what Serve aims at.

    Raises:
        LaunchError: the time is over.
    """
    deadline = time.monotonic() + timeout_s
    told = ""
    while True:
        replica = find(api, REPLICA)
        wanted = replica.target if replicas is None else replicas
        if replica.running == wanted == replica.target and len(replica.replicas) == wanted:
            return wanted
        if (now := f"{REPLICA}: {replica.running} of {wanted} running") != told:
            say(told := now)
        if time.monotonic() > deadline:
            raise LaunchError(f"{now} after {timeout_s:g} s. {replica.message}".rstrip())
        time.sleep(_POLL_S)


def find(api: ServeApi, name: str) -> Deployment:
    """A deployment of the running cluster.

    Raises:
        LaunchError: it runs none of that name.
    """
    for app in api.applications().values():
        for deployment in app.deployments:
            if deployment.name == name:
                return deployment
    raise LaunchError(f"the cluster runs no {name}: `farebox status` shows what it runs")


def running(api: ServeApi, name: str) -> int:
    """How many replicas of a deployment run; none while Serve builds its application anew and lists nothing of it."""
    deployments = (deployment for app in api.applications().values() for deployment in app.deployments)
    return sum(deployment.running for deployment in deployments if deployment.name == name)


def put(api: ServeApi, config: ServeConfig, attempts: int = 3) -> None:
    """Send a configuration, again when Ray's dashboard is still waking up.

    Raises:
        LaunchError: refused.
    """
    for attempt in range(attempts):
        try:
            api.put(config)
            return
        except ServeUnavailable as error:
            if attempt == attempts - 1:
                raise LaunchError(str(error)) from error
            time.sleep(1.0)


def read_deployed(text: str) -> ServeConfig:
    """What was last sent to Serve, as it was kept."""
    config: ServeConfig = json.loads(text)
    return config


def _deployment(config: ServeConfig, name: str) -> ServeConfig:
    for app in config["applications"]:
        for deployment in app.get("deployments", []):
            if deployment["name"] == name:
                found: ServeConfig = deployment
                return found
    raise LaunchError(f"the configuration has no deployment {name}")


def _progress(found: Mapping[str, Application]) -> str:
    deployments = [d for app in found.values() for d in app.deployments]
    if not deployments:
        return "waiting for Ray Serve"
    return "waiting for " + (", ".join(d.name for d in deployments if d.status != "HEALTHY") or "the API")


def _is_ready(api_url: str) -> bool:
    try:
        return httpx.get(f"{api_url}/readyz", timeout=5).status_code == httpx.codes.OK
    except httpx.HTTPError:
        return False
