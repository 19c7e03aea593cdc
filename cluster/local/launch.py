"""Applies a configuration to a running Ray Serve, and waits until it is in force."""

import time
from collections.abc import Callable, Mapping

import httpx

from cluster.errors import ClusterError
from cluster.local.capacity import limits
from cluster.local.configuration import replica_options
from cluster.serve_api import (
    DEPLOY_FAILED,
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

Progress = Callable[[str], None]
"""Called with the name of each step when it begins."""


class LaunchError(ClusterError):
    """A process did not start, or a configuration is not in force; the message has the cause that Ray Serve gives."""


def put(api: ServeApi, config: ServeConfig, attempts: int = 3) -> None:
    """Send a configuration; try again while Ray's dashboard is starting.

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


def refuse_lost_applications(config: ServeConfig, running: Mapping[str, Application]) -> None:
    """Refuse a configuration without an application that runs: Ray Serve would end that application.

    Raises:
        LaunchError: it lacks one.
    """
    lost = sorted(set(running) - {str(app["name"]) for app in config["applications"]})
    if lost:
        raise LaunchError(
            f"the cluster runs {', '.join(lost)}, which this file does not have: applying the file would end it. "
            "Add it to the file, or start anew with `farebox down` and `farebox up`"
        )


def wait_healthy(api: ServeApi, api_url: str, progress: Progress, timeout_s: float = HEALTHY_TIMEOUT_S) -> None:
    """Wait until every application runs and ``/readyz`` answers 200.

    Raises:
        LaunchError: an application failed, or ``timeout_s`` have passed; with the replica's own error.
    """
    deadline = time.monotonic() + timeout_s
    last_step = ""
    while True:
        applications = api.applications()
        failed = [app for app in applications.values() if app.status == DEPLOY_FAILED]
        if failed:
            raise LaunchError("\n".join(f"{app.name} does not start.\n{app.problem}" for app in failed))
        if applications and all(app.status == RUNNING for app in applications.values()) and _is_ready(api_url):
            return
        if (step := _step(applications)) != last_step:
            progress(last_step := step)
        if time.monotonic() > deadline:
            problems = "\n".join(filter(None, (app.problem for app in applications.values())))
            raise LaunchError(
                f"not healthy after {timeout_s:g} s: {step}; `farebox logs` shows why\n{problems}".rstrip()
            )
        time.sleep(_POLL_S)


def refuse_without_room(api: ServeApi, config: ServeConfig, replicas: int) -> None:
    """Refuse more LoRA replicas than this machine and Ray's cluster have room for.

    Raises:
        LaunchError: they do not fit; it says how many do, and why.
    """
    replica = find(api, REPLICA)
    tightest = next(iter(limits(replica_options(config), api.usage(), replica.pids)), None)
    if tightest is None or replicas <= (fit := len(replica.pids) + tightest.more) or replicas <= replica.running:
        return
    raise LaunchError(
        f"{replicas} LoRA replicas do not fit, {fit} do: {tightest.reason}. Scale to {fit}, or start them all the same "
        "with --force: those for which Ray has nothing left wait, and memory that runs out ends the others too"
    )


def wait_scaled(api: ServeApi, replicas: int | None, progress: Progress, timeout_s: float = HEALTHY_TIMEOUT_S) -> int:
    """Wait until this many LoRA replicas run, or with ``None`` as many as Ray Serve wants; returns their number.

    Raises:
        LaunchError: ``timeout_s`` have passed.
    """
    deadline = time.monotonic() + timeout_s
    last_step = ""
    while True:
        replica = find(api, REPLICA)
        wanted = replica.target if replicas is None else replicas
        if replica.running == wanted == replica.target and len(replica.replicas) == wanted:
            return wanted
        if (step := f"{REPLICA}: {replica.running} of {wanted} running") != last_step:
            progress(last_step := step)
        if time.monotonic() > deadline:
            raise LaunchError(f"{step} after {timeout_s:g} s. {replica.message}".rstrip())
        time.sleep(_POLL_S)


def find(api: ServeApi, name: str) -> Deployment:
    """A deployment of the running cluster.

    Raises:
        LaunchError: the cluster runs none of that name.
    """
    for app in api.applications().values():
        for deployment in app.deployments:
            if deployment.name == name:
                return deployment
    raise LaunchError(f"the cluster runs no {name}: `farebox status` shows what it runs")


def running(api: ServeApi, name: str) -> int:
    """How many replicas of a deployment run; 0 while Ray Serve rebuilds its application and lists no deployments."""
    deployments = (deployment for app in api.applications().values() for deployment in app.deployments)
    return sum(deployment.running for deployment in deployments if deployment.name == name)


def _step(applications: Mapping[str, Application]) -> str:
    deployments = [d for app in applications.values() for d in app.deployments]
    if not deployments:
        return "waiting for Ray Serve"
    return "waiting for " + (", ".join(d.name for d in deployments if d.status != "HEALTHY") or "the API")


def _is_ready(api_url: str) -> bool:
    try:
        return httpx.get(f"{api_url}/readyz", timeout=5).status_code == httpx.codes.OK
    except httpx.HTTPError:
        return False
