"""The farebox that a command works on: the one that runs in this folder, or one on a cluster.

On a cluster the environment says where it is: ``REDIS_URL`` and Dodo's variables.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TypeVar

from redis.asyncio import Redis

from billing.store.connection import connect
from cluster.errors import ClusterError
from cluster.local.configuration import StoreOptions, store_options_in
from cluster.local.environment import SANDBOX, OperatorEnvironment, service_environment
from cluster.local.settings import SANDBOX_PORT, Settings
from cluster.local.state import Home, Run
from cluster.serve_api import ServeApi

T = TypeVar("T")


class NotRunning(ClusterError):
    """No farebox runs in this folder, or it has not started yet."""


@dataclass(frozen=True)
class Running:
    """A farebox that runs on this machine."""

    home: Home
    run: Run

    @classmethod
    def find(cls, settings: Settings) -> Self:
        """The farebox of this folder.

        Raises:
            NotRunning: none runs.
        """
        home = Home(settings.home)
        run = home.read_run()
        if run is None or not run.is_alive:
            raise NotRunning(f"no farebox runs in {settings.home}: start one with `farebox up`")
        return cls(home, run)

    @property
    def settings(self) -> Settings:
        """The settings that it was started with, whatever the environment of this command says."""
        run = self.run
        return Settings.model_construct(
            home=self.home.path,
            config=Path(run.config),
            port=_port(run.api_url),
            dashboard_port=_port(run.dashboard_url),
            sandbox_port=_port(run.sandbox_url) if run.sandbox_url else SANDBOX_PORT,
            haproxy=run.haproxy,
        )

    @property
    def operator(self) -> OperatorEnvironment:
        """What the operator's environment named when it was started."""
        return OperatorEnvironment.kept_in(self.home)

    @property
    def environment(self) -> dict[str, str]:
        """The variables that its processes have, whatever the environment of this command says."""
        return service_environment(self.settings, self.home.secrets(), self.run.store_url, self.operator)

    def refuse_other(self) -> None:
        """Raises SettingsError if this shell's variables name another Dodo or store than those that it runs with."""
        self.operator.refuse_other(os.environ, self.settings.sandbox_url, self.run.store_url)

    def api(self) -> ServeApi:
        return ServeApi(self.run.dashboard_url, self.home.secrets().ray_token)


def _port(url: str) -> int:
    return int(url.rsplit(":", 1)[1])


@dataclass(frozen=True)
class Target:
    """The settings and environment variables of a farebox, and how its store is used."""

    settings: Settings
    environment: Mapping[str, str]
    store_options: StoreOptions

    @classmethod
    def find(cls, settings: Settings) -> Self:
        """The farebox that runs in this folder, else the one whose store is ``REDIS_URL``.

        Raises:
            NotRunning: neither.
            SettingsError: this shell names another Dodo or store than those of the one that runs.
        """
        try:
            running = Running.find(settings)
        except NotRunning as error:
            if not os.environ.get("REDIS_URL"):
                raise NotRunning(f"{error}; for one on a cluster set REDIS_URL and Dodo's variables") from None
            return cls(settings, dict(os.environ), store_options_in(settings.config))
        running.refuse_other()
        deployed = running.home.deployed
        in_force = deployed if deployed.exists() else Path(running.run.config)
        return cls(running.settings, running.environment, store_options_in(in_force))

    @property
    def store_url(self) -> str:
        return self.environment["REDIS_URL"]

    @property
    def dodo_environment(self) -> str:
        """``sandbox``, ``test_mode`` or ``live_mode``."""
        return self.environment.get("FAREBOX_DODO_ENVIRONMENT") or SANDBOX

    @asynccontextmanager
    async def store(self) -> AsyncIterator[Redis]:
        redis = await connect(self.store_url, **self.store_options)
        try:
            yield redis
        finally:
            await redis.aclose()


def with_store(command: Callable[[Redis], Awaitable[T]]) -> T:
    """Run ``command`` with a client of the target's store."""

    async def run(target: Target) -> T:
        async with target.store() as redis:
            return await command(redis)

    return asyncio.run(run(Target.find(Settings.from_env())))
