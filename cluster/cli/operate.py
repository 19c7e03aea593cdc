"""What an operator asks of a running farebox: how it is, another configuration, another size.

Knows the running one's addresses and secrets from its folder; starts and ends nothing.
"""

import asyncio
import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import httpx

from billing.catalog.catalog import Catalog
from billing.catalog.publication import GatewayState, current, gateways
from billing.clock import now_ms
from billing.commerce.offers import left_behind
from billing.errors import BillingError
from billing.store.connection import connect
from billing.tenants.directory import Tenants
from billing.usage import TenantId
from cluster.local import commerce, launch, ray_node
from cluster.local.environment import SANDBOX, dodo_environment, service_environment
from cluster.local.launch import LaunchError, Say
from cluster.local.settings import Settings, SettingsError
from cluster.local.state import Home, Phase, Run, write_private
from cluster.serve_api import GATEWAY, RUNNING, Application, ServeApi, ServeUnavailable

CATALOGUE_TIMEOUT_S = 60.0
NAMED_TENANTS = 5
GATEWAY_ALIVE_MS = 15_000
"""A gateway repeats itself every five seconds; one that has been silent this long is gone."""


class NotRunning(Exception):
    """There is no farebox in this folder to ask."""


@dataclass(frozen=True)
class Running:
    """A farebox that runs, and what is needed to talk to it."""

    home: Home
    run: Run

    @classmethod
    def find(cls, settings: Settings) -> "Running":
        """The farebox of this folder.

        Raises:
            NotRunning: there is none, or it has not got far enough.
        """
        home = Home(settings.home)
        run = home.run()
        if run is None or not run.is_alive:
            raise NotRunning(f"no farebox runs in {settings.home}: start one with `farebox up`")
        return cls(home, run)

    @property
    def settings(self) -> Settings:
        """As this farebox was started, whatever this shell's options say."""
        run = self.run
        return Settings(
            home=self.home.path,
            config=Path(run.config),
            api_port=_port(run.api_url),
            dashboard_port=_port(run.dashboard_url),
            sandbox_port=_port(run.sandbox_url) if run.sandbox_url else 0,
            haproxy=run.haproxy,
        )

    def api(self) -> ServeApi:
        return ServeApi(self.run.dashboard_url, self.home.secrets().ray_token)

    def environment(self) -> dict[str, str]:
        return service_environment(self.settings, self.home.secrets(), self.run.store_url)

    @property
    def terms(self) -> launch.StoreTerms:
        """What the configuration in force says of the store."""
        deployed = self.home.deployed
        return launch.store_terms_in(deployed if deployed.exists() else Path(self.run.config))


@dataclass(frozen=True)
class Status:
    """How a farebox is, in one value that ``--json`` prints as it stands."""

    phase: str
    problem: str
    run: Run | None
    applications: dict[str, Application]
    billing: dict[str, object]
    """The billing actor's own account of itself; empty where it cannot be asked."""

    @property
    def is_healthy(self) -> bool:
        return self.phase == Phase.HEALTHY and all(app.status == RUNNING for app in self.applications.values())

    def to_json(self) -> str:
        addresses = {"metrics_url": self.run.metrics_url} if self.run else {}
        told = asdict(self)
        if self.run:
            told["run"]["store_url"] = without_password(self.run.store_url)
        return json.dumps({"healthy": self.is_healthy} | addresses | told, indent=2)


def without_password(url: str) -> str:
    """A store's address as it may be shown; a password stands before the host or in the query."""
    return re.sub(r"([?&_]password=)[^&]*", r"\1***", re.sub(r"(://[^:@/]*:).*@", r"\1***@", url))


def status(settings: Settings) -> Status:
    """How the farebox of this folder is; never raises."""
    run = Home(settings.home).run()
    if run is None:
        return Status("stopped", "", None, {}, {})
    if not run.is_alive:
        problem = run.problem or "its supervisor was killed: `farebox up` cleans up after it"
        return Status("stopped" if run.phase is not Phase.FAILED else run.phase, problem, run, {}, {})
    running = Running(Home(settings.home), run)
    try:
        applications, problem = running.api().applications(), run.problem
    except ServeUnavailable as error:
        applications, problem = {}, str(error)
    return Status(run.phase, problem, run, applications, _billing(running))


def deploy(settings: Settings, file: Path, say: Say, may_retire_plans: bool = False) -> Catalog:
    """Check a file, apply it, and return when every gateway serves what it says.

    ``may_retire_plans``: a plan that the file lacks may have tenants; they stay on it as it was.

    Raises:
        NotRunning, LaunchError, SettingsError: it is not in force, and why; what ran before runs on.
        BillingError: the store or Dodo does not answer.
    """
    running = Running.find(settings)
    if running.run.phase is not Phase.HEALTHY:
        raise NotRunning(f"farebox is {running.run.phase}: wait for `farebox status` to say healthy")
    wanted = replace(running.settings, config=file.absolute())
    say(f"checking {file}")
    config = commerce.resolved(wanted)
    api = running.api()
    launch.refuse_losses(config, api.applications())
    catalog, store = commerce.catalog_of(config), (running.run.store_url, launch.store_terms(config))
    if not may_retire_plans:
        asyncio.run(refuse_lost_plans(store, catalog))
    if dodo_environment() == SANDBOX:
        commerce.register(config, running.environment())
    say("applying")
    write_private(running.home.deployed, json.dumps(config, indent=2))
    launch.put(api, config)
    asyncio.run(_wait_served(store, catalog, lambda: launch.running(api, GATEWAY)))
    launch.wait_healthy(api, running.run.api_url, say)
    return catalog


def scale(settings: Settings, replicas: int | None, say: Say) -> int:
    """Run exactly this many LoRA replicas; ``None`` goes back to what the configuration says.

    Returns how many run. A later ``deploy`` takes its file's numbers again.

    Raises:
        NotRunning, LaunchError, SettingsError: why not.
    """
    if replicas is not None and replicas < 1:
        raise SettingsError("at least one replica must run: to stop everything, `farebox down`")
    running = Running.find(settings)
    config = launch.read_deployed(running.home.deployed.read_text())
    api = running.api()
    launch.put(api, config if replicas is None else launch.scaled(config, replicas))
    return launch.wait_scaled(api, replicas, say)


async def refuse_lost_plans(store: tuple[str, launch.StoreTerms], wanted: Catalog) -> None:
    """Raises LaunchError where tenants are on a plan that ``wanted`` drops or renames."""
    redis = await connect(store[0], **store[1])
    try:
        in_force = await current(redis)
        lost = {} if in_force is None else left_behind(await Tenants(redis).list(), in_force, wanted)
    finally:
        await redis.aclose()
    if lost:
        told = "; ".join(_told(plan, tenants) for plan, tenants in lost.items())
        raise LaunchError(
            f"this file lacks plans that tenants are on: {told}. Put them back (`visibility: hidden` sells them no "
            "more), move the tenants (PATCH /admin/tenants/ID), or deploy with --retire-plans: who is on them stays"
        )


def _told(plan: str, tenants: list[TenantId]) -> str:
    names = ", ".join(tenants[:NAMED_TENANTS])
    more = f" and {len(tenants) - NAMED_TENANTS} more" if len(tenants) > NAMED_TENANTS else ""
    return f"{plan} ({len(tenants)} tenant{'' if len(tenants) == 1 else 's'}: {names}{more})"


async def _wait_served(store: tuple[str, launch.StoreTerms], catalog: Catalog, running: Callable[[], int]) -> None:
    """Wait until every living gateway announces this catalog's hash."""
    redis = await connect(store[0], **store[1])
    loop = asyncio.get_running_loop()
    deadline = loop.time() + CATALOGUE_TIMEOUT_S
    try:
        while True:
            alive = [g for g in await gateways(redis) if now_ms() - g.at_ms < GATEWAY_ALIVE_MS]
            if len(alive) >= running() > 0 and _all_serve(alive, catalog):
                return
            if loop.time() > deadline:
                behind = [g.gateway_id for g in alive if g.hash != catalog.content_hash]
                raise LaunchError(
                    f"after {CATALOGUE_TIMEOUT_S:g} s {len(alive)} of {running()} gateways answer, and these still "
                    f"serve what they served before: {', '.join(behind) or 'none'}; `farebox logs` shows why, and "
                    "deploying again is safe"
                )
            await asyncio.sleep(0.05)
    finally:
        await redis.aclose()


def _all_serve(alive: list[GatewayState], catalog: Catalog) -> bool:
    return all(gateway.hash == catalog.content_hash for gateway in alive)


def _billing(running: Running) -> dict[str, object]:
    headers = {"Authorization": f"Bearer {running.environment()['FAREBOX_ADMIN_KEY']}"}
    try:
        reply = httpx.get(f"{running.run.api_url}/admin/billing", headers=headers, timeout=5)
    except (httpx.HTTPError, BillingError):
        return {}
    if reply.status_code != httpx.codes.OK:
        return {}
    found: dict[str, object] = reply.json()
    return found


def _port(url: str) -> int:
    return int(url.rsplit(":", 1)[1])


def log_files(settings: Settings) -> list[Path]:
    """Every log of the last run, ours first."""
    home = Home(settings.home)
    serve = ray_node.ray_folder(ray_node.folder(home.path)) / "session_latest" / "logs" / "serve"
    return [*sorted(home.logs.glob("*.log")), *sorted(home.store.glob("*.log")), *sorted(serve.glob("*.log"))]
