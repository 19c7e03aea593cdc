"""The services that every module of this folder works with."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from redis.asyncio import Redis

from billing.catalog.catalog import Catalog
from billing.clock import Clock, now_ms
from billing.dodo.client import Dodo
from billing.ledger.ledger import Ledger
from billing.tenants.directory import Tenants

CatalogSource = Callable[[], Awaitable[Catalog | None]]
"""Returns the catalog in force; ``None`` before the first is published."""


@dataclass(frozen=True, slots=True)
class Commerce:
    """A store, a Dodo and what stands on them."""

    redis: Redis
    dodo: Dodo
    ledger: Ledger
    tenants: Tenants
    catalog: CatalogSource
    clock: Clock = now_ms
