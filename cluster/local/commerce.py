"""The steps of a start that are about selling: the catalog, the store's fitness, Dodo's products, the demo's tenants.

Knows which part of billing does each; decides nothing about money.
"""

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path

import httpx

from billing.catalog.catalog import Catalog
from billing.commerce.sync import SyncReport, plan, sync
from billing.dodo.call_budget import SharedBudget
from billing.dodo.client import Dodo
from billing.dodo.settings import DodoSettings
from billing.errors import BillingError
from billing.store.connection import connect
from cluster.checking.findings import CheckFailed
from cluster.demo.tenants import SeedFailed, seed
from cluster.local import children, ray_node
from cluster.local.children import Child
from cluster.local.environment import inherited
from cluster.local.launch import LaunchError, StoreTerms, addressed, store_terms, user_config
from cluster.local.preflight import Obstacle
from cluster.local.settings import Settings, SettingsError
from cluster.local.state import Home, Secrets, write_private
from cluster.serve_api import ServeConfig, ServeUnavailable
from cluster.valkey import StoreError
from deployments.gateway.catalog_holder import read_catalog

FAILURES = (Obstacle, SettingsError, CheckFailed, LaunchError, StoreError, ServeUnavailable, SeedFailed, BillingError)
"""All that can keep a farebox from starting or make it end, each saying what to do."""

SANDBOX_TIMEOUT_S = 30.0
CHECK_TIMEOUT_S = 600.0
"""Adapters behind a URL are fetched to be checked."""


def resolved(settings: Settings) -> ServeConfig:
    """The configuration file checked, with real paths and digests, and this machine's ports.

    Raises:
        CheckFailed: something in it is wrong; every finding is in the message.
    """
    from cluster.checking.check import resolve

    return at_home(addressed(resolve(settings.config), settings), Home(settings.home))


def begin_check(settings: Settings, home: Home) -> Child:
    """Start checking the configuration file aside; ``end_check`` has the result."""
    (home.logs / "check.log").unlink(missing_ok=True)
    command = [sys.executable, "-m", "cluster.local.resolving", str(settings.config), str(home.checked)]
    return children.start("check", command, inherited() | ray_node.source_path(), home.path, home.logs / "check.log")


def end_check(check: Child, settings: Settings, home: Home) -> ServeConfig:
    """What ``resolved`` would give, once the check that was begun has ended.

    Raises:
        LaunchError: something in the file is wrong; every finding is in the message.
    """
    try:
        exit_code = check.process.wait(CHECK_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise LaunchError(
            f"checking {settings.config} took longer than {CHECK_TIMEOUT_S:g} s: `farebox check` shows where it waits"
        ) from None
    if exit_code != 0:
        raise LaunchError(
            check.log.read_text(errors="replace").strip()
            or "the check of the configuration was killed: is memory short?"
        )
    return at_home(addressed(json.loads(home.checked.read_text()), settings), home)


def at_home(config: ServeConfig, home: Home) -> ServeConfig:
    """Put what gateways and replicas keep on disk into this farebox's folder, unless the file says where."""
    places = {"spool_dir": home.spool, "adapter_cache_dir": home.adapters}
    changed = deepcopy(config)
    for app in changed["applications"]:
        args = app.get("args") or {}
        for name, place in places.items():
            if name in args and not Path(str(args[name])).is_absolute():
                args[name] = str(place)
    return changed


def catalog_of(config: ServeConfig) -> Catalog:
    """What a resolved configuration sells, as every gateway will read it."""
    return read_catalog(user_config(config))


def verify_store(url: str, terms: StoreTerms) -> None:
    """Raises StoreRefused or StoreUnavailable for a store that may not keep money."""

    async def ask() -> None:
        redis = await connect(url, **terms)
        await redis.aclose()

    asyncio.run(ask())


def wait_for_sandbox(url: str, child: Child) -> None:
    """Wait until the offline Dodo answers.

    Raises:
        LaunchError: it ended, or needs too long.
    """
    deadline = time.monotonic() + SANDBOX_TIMEOUT_S
    while True:
        try:
            httpx.get(url, timeout=2)
            return
        except httpx.HTTPError:
            if child.has_ended or time.monotonic() > deadline:
                raise LaunchError(f"the offline Dodo did not start:\n{child.tail()}") from None
            time.sleep(0.05)


def register(config: ServeConfig, env: Mapping[str, str], is_dry: bool = False) -> SyncReport:
    """Make what we sell, and where webhooks go, known to Dodo; the same again changes nothing.

    ``is_dry`` only says what would be made.

    Raises:
        DodoUnavailable, DodoRefused: Dodo's answer.
        SettingsError: nobody said where Dodo finds this API.
    """
    if not env.get("FAREBOX_PUBLIC_URL"):
        raise SettingsError("FAREBOX_PUBLIC_URL is not set: the API's public address, where Dodo sends webhooks")
    bring = plan if is_dry else sync

    async def tell() -> SyncReport:
        redis = await connect(env["REDIS_URL"], **store_terms(config))
        dodo = Dodo(DodoSettings.from_env(env), on_call=SharedBudget(redis).spend)
        try:
            return await bring(dodo, redis, catalog_of(config), f"{env['FAREBOX_PUBLIC_URL']}/webhooks/dodo")
        finally:
            await redis.aclose()
            await dodo.close()

    return asyncio.run(tell())


def seed_demo(settings: Settings, home: Home, kept: Secrets) -> None:
    """Make the demo's tenants over the running API, and keep their keys in ``demo.json``."""
    admin_key = os.environ.get("FAREBOX_ADMIN_KEY") or kept.admin_key
    tenants = asyncio.run(seed(settings.api_url, admin_key, settings.sandbox_url, _known_keys(home)))
    demo = {
        "base_url": settings.api_url,
        "admin_key": admin_key,
        "dodo_sandbox_url": settings.sandbox_url,
        "webhook_secret": kept.webhook_secret,
        "tenants": {
            name: {"api_key": t.api_key, "plan": t.plan, "dodo_customer_id": t.dodo_customer_id}
            for name, t in tenants.items()
        },
    }
    write_private(home.demo, json.dumps(demo, indent=2))


def _known_keys(home: Home) -> dict[str, str]:
    """The demo tenants' keys of an earlier run, so that a restart leaves them valid."""
    try:
        return {name: tenant["api_key"] for name, tenant in json.loads(home.demo.read_text())["tenants"].items()}
    except (FileNotFoundError, json.JSONDecodeError, KeyError):
        return {}
