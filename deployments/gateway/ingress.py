"""The Gateway as a Serve deployment: made from its environment, reconfigured in place, stopped at the end."""

import asyncio
import logging
import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle
from redis.asyncio import Redis
from starlette.types import ASGIApp

from billing.catalog import publication
from billing.clock import now_ms
from billing.store.connection import connect
from billing.store.errors import StoreRefused, StoreUnavailable
from deployments.config import FareboxArgs
from deployments.gateway.api.application import make_app
from deployments.gateway.catalog_holder import CatalogHolder
from deployments.gateway.gateway import Gateway
from deployments.gateway.parts import GatewayConfig, build_parts
from deployments.inference.text import Text
from deployments.replica import artifacts
from deployments.token_stream.gateway_end import ServeReplicaLink

STORE_START_TIMEOUT_S = 30.0
PUBLISH_INTERVAL_S = 5.0
"""A gateway that does not report itself again is soon no longer listed as alive."""
RETRY_INTERVAL_S = 0.5

logger = logging.getLogger(__name__)


class GatewayIngress:
    """A Serve deployment's class around one ``Gateway``."""

    _is_open = False

    # Serve awaits an async constructor: the store's client belongs to the replica's own event loop.
    async def __init__(  # type: ignore[misc]
        self, args: FareboxArgs, handle: "DeploymentHandle[object]"
    ) -> None:
        self._catalog_holder = CatalogHolder()
        redis = await connect_to_starting_store(store_url(os.environ), args)
        self._catalog_holder.remember(await publication.plans_ever(redis))
        cache = Path(args.adapter_cache_dir)
        base = await asyncio.to_thread(artifacts.fetch, args.model.path, cache, without_weights=True)
        self._link = ServeReplicaLink(handle)
        await self._link.start(ray.util.get_node_ip_address())
        parts = build_parts(
            args, os.environ, redis=redis, text=Text(base), link=self._link, catalog_holder=self._catalog_holder
        )
        self._gateway = Gateway(GatewayConfig.of(args, os.environ, _gateway_id()), parts)
        self._changed = asyncio.Event()
        self._publishing = asyncio.create_task(self._publish_forever())
        self._is_open = True

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return make_app(self._gateway)

    async def reconfigure(self, user_config: object) -> None:
        """Put a catalog in force. Never raises and never waits: Serve would end or stall this replica."""
        catalog = self._catalog_holder.put(user_config)
        for entry in catalog.rejected:
            logger.warning("rejected %s %s: %s", entry.kind, entry.id, entry.reason)
        self._changed.set()

    async def check_health(self) -> None:
        assert not self._publishing.done(), "the task that publishes the catalog has ended"
        self._gateway.check()

    async def __del__(self) -> None:
        """Serve calls this after it drained the replica; its ingress wrapper awaits only an ``async def``."""
        if self._is_open:
            await self.close()

    async def close(self) -> None:
        """Stop every request, and withdraw this gateway from the list of those that are alive."""
        self._is_open = False
        redis = self._gateway.parts.redis
        await self._gateway.stop()
        await self._link.close()
        self._publishing.cancel()
        with suppress(StoreUnavailable):
            await publication.forget_gateway(redis, self._gateway.config.gateway_id)
        await redis.aclose()

    async def _publish_forever(self) -> None:
        """Publish every new catalog at once, and between changes only that this gateway is alive."""
        redis, gateway_id = self._gateway.parts.redis, self._gateway.config.gateway_id
        is_published = False
        while True:
            is_published = is_published and not self._changed.is_set()
            self._changed.clear()
            if self._catalog_holder.has_catalog:
                publish = publication.renew if is_published else publication.publish
                try:
                    await publish(redis, self._catalog_holder.current, gateway_id, now_ms())
                    if not is_published:
                        self._catalog_holder.remember(await publication.plans_ever(redis))
                    is_published = True
                except StoreUnavailable as error:
                    logger.warning("the catalog could not be published: %s", error)
                except Exception:
                    is_published = False
                    logger.exception("the catalog could not be published")
            with suppress(TimeoutError):
                async with asyncio.timeout(PUBLISH_INTERVAL_S if is_published else RETRY_INTERVAL_S):
                    await self._changed.wait()


def store_url(environ: Mapping[str, str]) -> str:
    """The store's address. Raises StoreRefused where none is set."""
    url = environ.get("REDIS_URL", "")
    if not url:
        raise StoreRefused("REDIS_URL is not set: `farebox up` sets it, on a cluster give it to every node")
    return url


async def connect_to_starting_store(url: str, args: FareboxArgs) -> Redis:
    """Wait for a store that still starts. Raises StoreUnavailable after STORE_START_TIMEOUT_S, StoreRefused at once."""
    deadline = asyncio.get_running_loop().time() + STORE_START_TIMEOUT_S
    while True:
        try:
            return await connect(url, durability=args.durability, min_replicas_acked=args.min_replicas_acked)
        except StoreUnavailable:
            if asyncio.get_running_loop().time() > deadline:
                raise
            await asyncio.sleep(0.5)


def _gateway_id() -> str:
    try:
        return f"gw_{serve.get_replica_context().replica_id.unique_id}"
    except serve.exceptions.RayServeException:
        return "gw_" + secrets.token_hex(4)
