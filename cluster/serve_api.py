"""A client of Ray Serve's REST API: apply a configuration, read the state of its applications, shut them down."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from cluster.errors import ClusterError

GATEWAY, REPLICA = "Gateway", "LoraReplica"
"""Names of deployments."""
RUNNING, DEPLOY_FAILED = "RUNNING", "DEPLOY_FAILED"
_PATH = "/api/serve/applications/"
_TIMEOUT_S = 30.0

ServeConfig = dict[str, Any]
"""A parsed ``serve_config.yaml``, in Ray Serve's schema."""


class ServeUnavailable(ClusterError):
    """Ray's dashboard does not answer, or refuses a request."""


@dataclass(frozen=True)
class Deployment:
    """The state of one deployment."""

    name: str
    status: str
    message: str
    replicas: tuple[str, ...]
    """State of each replica, such as ``RUNNING``."""
    target: int
    """How many replicas Ray Serve wants to run."""
    pids: tuple[int, ...] = ()
    """Process ids of the replicas that run or start."""

    @property
    def running(self) -> int:
        return self.replicas.count(RUNNING)


@dataclass(frozen=True)
class Application:
    """The state of one application."""

    name: str
    status: str
    message: str
    deployments: tuple[Deployment, ...]

    @property
    def problem(self) -> str:
        """What is wrong: the messages of its deployments, which have the replicas' errors, else its own message."""
        problems = [f"{d.name}: {cause(d.message)}" for d in self.deployments if d.message]
        return "\n".join(problems) or cause(self.message)


def cause(message: str) -> str:
    """The last line of a message that has a traceback, which names the error; any other message unchanged."""
    if "Traceback (most recent call last)" not in message:
        return message
    lines = [line for line in re.sub(r"\x1b\[\d+m", "", message).splitlines() if line.strip()]
    return f"{lines[-1].strip()}\n(`farebox logs` shows the whole traceback)"


class ServeApi:
    """Talks to the dashboard of one cluster."""

    def __init__(self, url: str, token: str) -> None:
        self._http = httpx.Client(base_url=url, headers={"Authorization": f"Bearer {token}"}, timeout=_TIMEOUT_S)

    def is_up(self) -> bool:
        try:
            return self._http.get("/api/version", timeout=2).status_code == 200
        except httpx.HTTPError:
            return False

    def put(self, config: ServeConfig) -> None:
        """Send a configuration. Ray Serve accepts it at once and brings it into force later.

        Raises:
            ServeUnavailable: no answer, or it does not fit Ray Serve's schema.
        """
        self._call("PUT", config)

    def delete(self, timeout_s: float = _TIMEOUT_S) -> None:
        """Shut down all applications and wait until they have ended.

        Raises:
            ServeUnavailable: no answer within ``timeout_s``.
        """
        self._call("DELETE", timeout_s=timeout_s)

    def applications(self) -> dict[str, Application]:
        raw = self._call("GET").json().get("applications", {})
        return {name: _application(name, found) for name, found in raw.items()}

    def usage(self) -> dict[str, tuple[float, float]]:
        """Of each of Ray's resources, such as ``CPU``: how much is given away, and how much the cluster has.

        Empty in the first seconds of a cluster.
        """
        raw = self._call("GET", path="/api/cluster_status").json()
        report = ((raw.get("data") or {}).get("clusterStatus") or {}).get("loadMetricsReport") or {}
        return {name: (float(used), float(total)) for name, (used, total) in (report.get("usage") or {}).items()}

    def close(self) -> None:
        self._http.close()

    def _call(
        self, method: str, body: ServeConfig | None = None, timeout_s: float = _TIMEOUT_S, path: str = _PATH
    ) -> httpx.Response:
        try:
            reply = self._http.request(method, path, json=body, timeout=timeout_s)
        except httpx.HTTPError as error:
            raise ServeUnavailable(f"Ray's dashboard does not answer: {error!r}") from error
        if reply.status_code != 200:
            raise ServeUnavailable(f"Ray Serve refused the request with {reply.status_code}: {reply.text[:2000]}")
        return reply


def _application(name: str, raw: Mapping[str, Any]) -> Application:
    deployments = tuple(
        Deployment(
            name=key,
            status=str(found["status"]),
            message=str(found.get("message") or ""),
            replicas=tuple(str(replica["state"]) for replica in found.get("replicas", [])),
            target=int(found.get("target_num_replicas") or 0),
            pids=tuple(int(replica["pid"]) for replica in found.get("replicas", []) if replica.get("pid")),
        )
        for key, found in raw.get("deployments", {}).items()
    )
    return Application(name, str(raw["status"]), str(raw.get("message") or ""), deployments)
