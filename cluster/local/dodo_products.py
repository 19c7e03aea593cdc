"""Creates at Dodo what a configuration sells: products, the meter and the webhook."""

import asyncio
from collections.abc import Mapping

from billing.commerce.products import Products, sold
from billing.commerce.sync import SyncReport, plan, sync
from billing.dodo.belonging import claim, refuse_other
from billing.dodo.call_budget import SharedBudget
from billing.dodo.client import Dodo
from billing.dodo.settings import DodoSettings
from billing.store.connection import connect
from cluster.local.configuration import catalog_of, store_options
from cluster.local.environment import SANDBOX
from cluster.local.settings import SettingsError
from cluster.serve_api import ServeConfig


def sync_products(config: ServeConfig, env: Mapping[str, str], is_dry_run: bool = False) -> SyncReport:
    """Create what Dodo lacks; a second call changes nothing. A dry run only reports what would be created.

    Raises:
        DodoUnavailable, DodoRefused: Dodo's answer.
        DodoMisconfigured: the store belongs to another environment of Dodo.
        SettingsError: the public address of this API is not set.
    """
    public_url = env.get("FAREBOX_PUBLIC_URL")
    if not public_url:
        raise SettingsError("FAREBOX_PUBLIC_URL is not set: set it to the API's public address, for Dodo's webhooks")

    async def run() -> SyncReport:
        redis = await connect(env["REDIS_URL"], **store_options(config))
        dodo = Dodo(DodoSettings.from_env(env), on_call=SharedBudget(redis).spend)
        try:
            await (refuse_other if is_dry_run else claim)(redis, env.get("FAREBOX_DODO_ENVIRONMENT") or SANDBOX)
            return await (plan if is_dry_run else sync)(dodo, redis, catalog_of(config), f"{public_url}/webhooks/dodo")
        finally:
            await redis.aclose()
            await dodo.close()

    return asyncio.run(run())


async def missing_products(config: ServeConfig, env: Mapping[str, str]) -> list[str]:
    """Names of what a configuration sells and what was not created at Dodo, as far as the store says."""
    redis = await connect(env["REDIS_URL"], **store_options(config))
    try:
        products = Products(redis)
        return [terms.name for terms in sold(catalog_of(config)) if not await products.id_for(terms)]
    finally:
        await redis.aclose()
