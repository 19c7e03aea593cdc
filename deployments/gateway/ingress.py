"""The Gateway as Serve runs it: built from its environment, reconfigured in place, drained at the end.

Knows Serve's life cycle and environment variables; what a request passes is the gateway's business.
"""

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
from deployments.gateway.wiring import build_services
from deployments.inference.text import Text
from deployments.replica import artifacts
from deployments.token_stream.gateway_end import SocketLink
from deployments.token_stream.serve_link import ServeLink

STORE_PATIENCE_S = 30.0
PUBLISH_INTERVAL_S = 5.0
"""The board shows a gateway as alive for as long as it repeats itself."""
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
        redis = await connect_patiently(store_url(os.environ), args)
        self._catalog_holder.remember(await publication.plans_ever(redis))
        cache = Path(args.adapter_cache_dir)
        base = await asyncio.to_thread(artifacts.fetch, args.model.path, cache, without_weights=True)
        self._link = await open_link(handle, args.token_transport)
        self._services = build_services(
            args, Text(base), redis, self._link, self._catalog_holder, os.environ, _replica_name()
        )
        self._changed = asyncio.Event()
        self._publishing = asyncio.create_task(self._publish_for_ever())
        self._is_open = True

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return make_app(self._services)

    async def reconfigure(self, user_config: object) -> None:
        """Swap the catalog. Never raises, never waits: Serve would end or stall this replica."""
        catalog = self._catalog_holder.put(user_config)
        for entry in catalog.rejected:
            logger.warning("rejected %s %s: %s", entry.kind, entry.id, entry.reason)
        self._changed.set()

    async def check_health(self) -> None:
        assert not self._publishing.done(), "the publishing loop never ends on its own"
        self._services.gateway.check()

    async def __del__(self) -> None:
        """Serve calls this after it drained the replica; its ingress wrapper awaits only an ``async def``."""
        if self._is_open:
            await self.close()

    async def close(self) -> None:
        """End what is open, leave the board and let the store go."""
        self._is_open = False
        await self._services.gateway.stop()
        await self._link.close()
        self._publishing.cancel()
        with suppress(StoreUnavailable):
            await publication.forget_gateway(self._services.redis, self._services.gateway_id)
        await self._services.redis.aclose()

    async def _publish_for_ever(self) -> None:
        """Put every change in force at once; between changes only say that this gateway lives."""
        redis, gateway_id = self._services.redis, self._services.gateway_id
        is_published = False
        while True:
            is_published = is_published and not self._changed.is_set()
            self._changed.clear()
            if self._catalog_holder.is_stocked:
                tell = publication.renew if is_published else publication.publish
                try:
                    await tell(redis, self._catalog_holder.current, gateway_id, now_ms())
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


async def open_link(handle: "DeploymentHandle[object]", transport: str) -> ServeLink:
    """The link that the configuration chose; a socket's listener is on the address by which Ray knows this node."""
    if transport == "serve":
        return ServeLink(handle)
    link = SocketLink(handle)
    await link.start(ray.util.get_node_ip_address())
    return link


def store_url(environ: Mapping[str, str]) -> str:
    """Raises StoreRefused without an address: a replica never starts a store of its own."""
    url = environ.get("REDIS_URL", "")
    if not url:
        raise StoreRefused("REDIS_URL is not set: `farebox up` sets it, on a cluster give it to every node")
    return url


async def connect_patiently(url: str, args: FareboxArgs) -> Redis:
    """Wait for a store that is still starting. Raises StoreUnavailable after STORE_PATIENCE_S, StoreRefused at once."""
    deadline = asyncio.get_running_loop().time() + STORE_PATIENCE_S
    while True:
        try:
            return await connect(url, durability=args.durability, min_replicas_acked=args.min_replicas_acked)
        except StoreUnavailable:
            if asyncio.get_running_loop().time() > deadline:
                raise
            await asyncio.sleep(0.5)


def _replica_name() -> str:
    try:
        return f"gw_{serve.get_replica_context().replica_id.unique_id}"
    except serve.exceptions.RayServeException:
        return "gw_" + secrets.token_hex(4)
