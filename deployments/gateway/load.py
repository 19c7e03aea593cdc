"""How busy the replicas are, as a share of what they can run at once: a price may depend on it."""

import asyncio
import logging

from billing.pricing.modifiers import UNIT
from deployments.gateway.catalog_holder import CatalogHolder
from deployments.token_stream.link import ReplicaLink

INTERVAL_S = 2.0

logger = logging.getLogger(__name__)


class LoadMeter:
    """The load of all replicas, measured while the catalog prices load."""

    def __init__(self, link: ReplicaLink, catalog_holder: CatalogHolder, max_running: int) -> None:
        self._link, self._catalog_holder, self._max_running = link, catalog_holder, max_running
        self._load = 0

    def __call__(self) -> int:
        """Ten-thousandths of the capacity in use, more than 10,000 where requests wait; 0 while load has no price."""
        return self._load

    async def measure(self) -> None:
        """Ask the replicas. Those that do not answer are left out, with their work and their capacity."""
        is_priced = self._catalog_holder.has_catalog and self._catalog_holder.current.pricing.load is not None
        found = list((await self._link.stats()).values()) if is_priced else []
        busy = sum(one.running + one.waiting for one in found)
        self._load = busy * UNIT // (len(found) * self._max_running) if found else 0

    async def run(self) -> None:
        while True:
            try:
                await self.measure()
            except Exception:
                logger.exception("the load of the replicas was not measured")
            await asyncio.sleep(INTERVAL_S)
