"""``farebox check``, ``deploy`` and ``scale``: a configuration checked, applied, and its replicas counted."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from billing.catalog.catalog import Catalog
from billing.catalog.publication import current, gateways
from billing.clock import now_ms
from billing.commerce.offers import left_behind
from billing.errors import BillingError
from billing.store.connection import connect
from billing.tenants.directory import Tenants
from billing.usage import TenantId
from cluster.cli.output import JsonOption, out, steps
from cluster.cli.selling import make_at_dodo, sync_table
from cluster.cli.target import NotRunning, Running
from cluster.local import launch
from cluster.local.configuration import StoreOptions, catalog_of, checked, scaled, store_options
from cluster.local.dodo_products import sync_products
from cluster.local.launch import LaunchError
from cluster.local.settings import Settings, SettingsError
from cluster.local.state import Phase, write_private
from cluster.serve_api import GATEWAY

CATALOG_TIMEOUT_S = 60.0
TENANTS_NAMED_MAX = 5
GATEWAY_ALIVE_MS = 15_000
"""A gateway announces its catalog every 5 s; after this time without an announcement it is taken to have ended."""

File = Annotated[Path, typer.Argument(help="The configuration file.")]


def check(
    file: File = Path("serve_config.yaml"),
    as_json: JsonOption = False,
    resolved: Annotated[
        bool, typer.Option("--resolved", help="Print the file as Ray Serve gets it: with absolute paths and digests.")
    ] = False,
) -> None:
    """Check every key, value, price and adapter of a file. Exit code 0 if it is valid, else 1.

    Where a farebox runs, what a deployment would create at its Dodo is shown too, whatever that is.
    """
    from cluster.checking import check as checking
    from cluster.cli.findings import report_table

    if resolved:
        print(checking.portable(file), end="")
        return
    report = checking.check(file)
    if as_json:
        print(report.to_json())
    else:
        out.print(report_table(report))
        if report.is_valid:
            _show_what_dodo_lacks(file)
    raise typer.Exit(0 if report.is_valid else 1)


def _show_what_dodo_lacks(file: Path) -> None:
    """Where a farebox runs in this folder: what a deployment of the file would create at its Dodo."""
    try:
        running = Running.find(Settings.from_env())
        running.refuse_other()
        config = checked(running.settings.model_copy(update={"config": file.absolute()}))
        planned = sync_products(config, running.environment, is_dry_run=True)
    except NotRunning:
        return
    except (BillingError, SettingsError) as error:
        out.print(f"only the file was checked; what a deployment would create at Dodo was not looked up: {error}")
        return
    if planned.created:
        out.print("`farebox deploy` would first create at Dodo:")
        out.print(sync_table(planned))


def deploy(
    file: File = Path("serve_config.yaml"),
    retire_plans: Annotated[
        bool, typer.Option("--retire-plans", help="Allow the file to drop plans that have tenants; they stay on them.")
    ] = False,
    yes: Annotated[
        bool, typer.Option("--yes", help="Create products at Dodo without asking, in live mode too.")
    ] = False,
) -> None:
    """Check a file, apply it to the running farebox, and return when every gateway serves it.

    What it sells and Dodo lacks is shown and created there first; in live mode this asks. A changed price or grant is a
    new product, and whoever still pays the old one gets what that sold.
    """
    catalog = deploy_file(Settings.from_env(), file, retire_plans, yes)
    out.print(f"in force: {', '.join(model.identity for model in catalog.models)}")


def scale(
    replicas: Annotated[str, typer.Argument(help="A number of LoRA replicas, or auto.")],
    force: Annotated[bool, typer.Option("--force", help="Start them even if they do not fit.")] = False,
) -> None:
    """Run a fixed number of LoRA replicas; `auto` returns to the bounds in the configuration."""
    if replicas != "auto" and not (replicas.isdigit() and int(replicas) > 0):
        raise SettingsError(
            f"{replicas!r} is neither a number of replicas from 1 nor `auto`; to stop all, use `farebox down`"
        )
    running = Running.find(Settings.from_env())
    config = json.loads(running.home.deployed.read_text())
    wanted = None if replicas == "auto" else int(replicas)
    api = running.api()
    if wanted is not None and not force:
        launch.refuse_without_room(api, config, wanted)
    launch.put(api, config if wanted is None else scaled(config, wanted))
    with steps() as progress:
        number = launch.wait_scaled(api, wanted, progress)
    out.print(f"{number} LoRA replicas run")


def deploy_file(settings: Settings, file: Path, may_retire_plans: bool = False, is_agreed: bool = False) -> Catalog:
    """Check a file, apply it, and wait until every gateway serves its catalog. ``is_agreed``: ask for nothing.

    Raises:
        NotRunning, SettingsError, CheckFailed, LaunchError: it is not in force; what ran before still runs.
        BillingError: the store or Dodo does not answer.
    """
    running = Running.find(settings)
    running.refuse_other()
    if running.run.phase is not Phase.HEALTHY:
        raise NotRunning(f"farebox is {running.run.phase}: wait until `farebox status` says healthy")
    api = running.api()
    with steps() as progress:
        progress(f"checking {file}")
        config = checked(running.settings.model_copy(update={"config": file.absolute()}))
        launch.refuse_lost_applications(config, api.applications())
        url, options, catalog = running.run.store_url, store_options(config), catalog_of(config)
        if not may_retire_plans:
            asyncio.run(refuse_lost_plans(url, options, catalog))
    make_at_dodo(config, running.environment, is_agreed)
    with steps() as progress:
        progress("applying")
        write_private(running.home.deployed, json.dumps(config, indent=2))
        launch.put(api, config)
        asyncio.run(_wait_until_served(url, options, catalog, lambda: launch.running(api, GATEWAY)))
        launch.wait_healthy(api, running.run.api_url, progress)
    return catalog


async def refuse_lost_plans(store_url: str, options: StoreOptions, catalog: Catalog) -> None:
    """Raises LaunchError if tenants are on a plan that is in force and that ``catalog`` lacks."""
    redis = await connect(store_url, **options)
    try:
        in_force = await current(redis)
        lost = {} if in_force is None else left_behind(await Tenants(redis).list(), in_force, catalog)
    finally:
        await redis.aclose()
    if lost:
        plans = "; ".join(_with_tenants(plan, tenants) for plan, tenants in lost.items())
        raise LaunchError(
            f"this file lacks plans that tenants are on: {plans}. Put them back (with `visibility: hidden` they are "
            "not sold), move the tenants (PATCH /admin/tenants/ID), or deploy with --retire-plans, which leaves these "
            "tenants on their plans"
        )


def _with_tenants(plan: str, tenants: list[TenantId]) -> str:
    names = ", ".join(tenants[:TENANTS_NAMED_MAX])
    more = f" and {len(tenants) - TENANTS_NAMED_MAX} more" if len(tenants) > TENANTS_NAMED_MAX else ""
    return f"{plan} ({len(tenants)} tenant{'' if len(tenants) == 1 else 's'}: {names}{more})"


async def _wait_until_served(
    store_url: str, options: StoreOptions, catalog: Catalog, count_running: Callable[[], int]
) -> None:
    """Wait until every gateway that runs has announced this catalog.

    Raises:
        LaunchError: not within ``CATALOG_TIMEOUT_S``.
    """
    redis = await connect(store_url, **options)
    loop = asyncio.get_running_loop()
    deadline = loop.time() + CATALOG_TIMEOUT_S
    try:
        while True:
            alive = [gateway for gateway in await gateways(redis) if now_ms() - gateway.at_ms < GATEWAY_ALIVE_MS]
            behind = [gateway.gateway_id for gateway in alive if gateway.hash != catalog.content_hash]
            running = count_running()
            if not behind and len(alive) >= running > 0:
                return
            if loop.time() > deadline:
                raise LaunchError(
                    f"after {CATALOG_TIMEOUT_S:g} s {len(alive)} of {running} gateways answer, and these still serve "
                    f"the catalog of before: {', '.join(behind) or 'none'}; `farebox logs` shows why, and it is safe "
                    "to deploy again"
                )
            await asyncio.sleep(0.05)
    finally:
        await redis.aclose()
