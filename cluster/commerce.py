"""The steps of a start that are about selling: the catalogue, the store's fitness, Dodo's products, the demo's tenants.

Knows which part of billing does each; decides nothing about money.
"""

import asyncio
import json
import time
from collections.abc import Mapping

import httpx

from billing.catalogue import Catalogue
from billing.dodo import Dodo, DodoSettings
from billing.errors import BillingError
from billing.store.connection import connect
from cluster.children import Child
from cluster.launch import LaunchError, addressed, user_config
from cluster.preflight import Obstacle
from cluster.serve_api import ServeConfig, ServeUnavailable
from cluster.settings import Settings, SettingsError
from cluster.state import Home, Secrets, write_private
from cluster.valkey import StoreError
from deployments.catalogue import read_catalogue

FAILURES = (Obstacle, SettingsError, LaunchError, StoreError, ServeUnavailable, BillingError)
"""All that can keep a farebox from starting or make it end, each saying what to do."""

SANDBOX_TIMEOUT_S = 30.0


def resolved(settings: Settings) -> ServeConfig:
    """The configuration file checked, with real paths and digests, and this machine's ports.

    Raises:
        LaunchError: something in it is wrong; every finding is in the message.
    """
    from cluster.check import resolve

    return addressed(resolve(settings.config), settings)


def catalogue_of(config: ServeConfig) -> Catalogue:
    """What a resolved configuration sells, as every gateway will read it."""
    return read_catalogue(user_config(config))


def verify_store(url: str) -> None:
    """Raises StoreRefused or StoreUnavailable for a store that may not keep money."""

    async def ask() -> None:
        redis = await connect(url)
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


def register(config: ServeConfig, env: Mapping[str, str]) -> str:
    """Make what we sell known to Dodo, idempotently; returns the webhook's secret.

    Raises:
        DodoUnavailable, DodoRefused: Dodo's answer.
    """
    from billing.dodo_sync import sync

    async def tell() -> str:
        dodo = Dodo(DodoSettings.from_env(env))
        redis = await connect(env["REDIS_URL"])
        try:
            report = await sync(dodo, redis, catalogue_of(config), f"{env['FAREBOX_PUBLIC_URL']}/webhooks/dodo")
            return await dodo.webhook_secret(report.webhook_id)
        finally:
            await redis.aclose()
            await dodo.close()

    return asyncio.run(tell())


def seed_demo(settings: Settings, home: Home, kept: Secrets) -> None:
    """Make the demo's tenants over the running API, and keep their keys in ``demo.json``."""
    from cluster.demo.tenants import seed

    tenants = asyncio.run(seed(settings.api_url, kept.admin_key, settings.sandbox_url))
    demo = {
        "base_url": settings.api_url,
        "admin_key": kept.admin_key,
        "dodo_sandbox_url": settings.sandbox_url,
        "webhook_secret": kept.webhook_secret,
        "tenants": {
            name: {"api_key": t.api_key, "plan": t.plan, "dodo_customer_id": t.dodo_customer_id}
            for name, t in tenants.items()
        },
    }
    write_private(home.demo, json.dumps(demo, indent=2))
