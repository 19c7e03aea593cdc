"""Ray Serve's REST API, as far as farebox uses it: put a configuration, ask how it goes, end it.

Knows the dashboard's address and token. What a configuration should hold is not its business.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx

GATEWAY, REPLICA = "Gateway", "LoraReplica"
"""Names of the deployments, as Serve knows them."""
RUNNING, DEPLOY_FAILED = "RUNNING", "DEPLOY_FAILED"
_PATH = "/api/serve/applications/"
_TIMEOUT_S = 30.0

ServeConfig = dict[str, Any]
"""A ``serve_config.yaml`` as parsed: Serve's own schema, passed on whole."""


class ServeUnavailable(Exception):
    """Ray's dashboard does not answer, or refuses what it was sent."""


@dataclass(frozen=True)
class Deployment:
    """One deployment as Serve sees it."""

    name: str
    status: str
    message: str
    replicas: tuple[str, ...]
    """State of each replica, such as ``RUNNING``."""
    target: int

    @property
    def running(self) -> int:
        return self.replicas.count(RUNNING)


@dataclass(frozen=True)
class Application:
    """One application as Serve sees it."""

    name: str
    status: str
    message: str
    deployments: tuple[Deployment, ...]

    @property
    def problem(self) -> str:
        """What Serve says is wrong, deployments first: theirs holds the replica's own error."""
        said = [f"{d.name}: {cause(d.message)}" for d in self.deployments if d.message]
        return "\n".join(said) or cause(self.message)


def cause(message: str) -> str:
    """The line of a traceback that names the error; any other message as it stands."""
    if "Traceback (most recent call last)" not in message:
        return message
    lines = [line for line in re.sub(r"\x1b\[\d+m", "", message).splitlines() if line.strip()]
    return f"{lines[-1].strip()}\n(all of it: `farebox logs`)"


class ServeApi:
    """A client of one cluster's dashboard."""

    def __init__(self, url: str, token: str) -> None:
        self._http = httpx.Client(base_url=url, headers={"Authorization": f"Bearer {token}"}, timeout=_TIMEOUT_S)

    def is_up(self) -> bool:
        try:
            return self._http.get("/api/version", timeout=2).status_code == 200
        except httpx.HTTPError:
            return False

    def put(self, config: ServeConfig) -> None:
        """Send a configuration; Serve then works towards it on its own.

        Raises:
            ServeUnavailable: no answer, or the schema was refused.
        """
        self._call("PUT", config)

    def delete(self, timeout_s: float = _TIMEOUT_S) -> None:
        """Shut down everything Serve runs; returns when it is gone.

        Raises:
            ServeUnavailable: it needs longer, or does not answer.
        """
        self._call("DELETE", timeout_s=timeout_s)

    def applications(self) -> dict[str, Application]:
        raw = self._call("GET").json().get("applications", {})
        return {name: _application(name, found) for name, found in raw.items()}

    def close(self) -> None:
        self._http.close()

    def _call(self, method: str, body: ServeConfig | None = None, timeout_s: float = _TIMEOUT_S) -> httpx.Response:
        try:
            reply = self._http.request(method, _PATH, json=body, timeout=timeout_s)
        except httpx.HTTPError as error:
            raise ServeUnavailable(f"Ray's dashboard does not answer: {error!r}") from error
        if reply.status_code != 200:
            raise ServeUnavailable(f"Ray Serve refused ({reply.status_code}): {reply.text[:2000]}")
        return reply


def _application(name: str, raw: Mapping[str, Any]) -> Application:
    deployments = tuple(
        Deployment(
            name=key,
            status=str(found["status"]),
            message=str(found.get("message") or ""),
            replicas=tuple(str(replica["state"]) for replica in found.get("replicas", [])),
            target=int(found.get("target_num_replicas") or 0),
        )
        for key, found in raw.get("deployments", {}).items()
    )
    return Application(name, str(raw["status"]), str(raw.get("message") or ""), deployments)
