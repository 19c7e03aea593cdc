"""What a start does with its store before anything else uses it."""

from billing.dodo.belonging import claim
from billing.store.connection import connect, reach
from billing.store.keys import SCHEMA
from billing.store.migrations import migrate
from cluster.local.configuration import StoreOptions
from cluster.local.launch import Progress


async def migrate_store(url: str, progress: Progress) -> None:
    """Bring the store that this start has just started to this version's schema.

    Raises:
        StoreRefused, StoreUnavailable: it cannot be migrated, or does not answer.
    """
    redis = await reach(url)
    try:
        done = await migrate(redis)
    finally:
        await redis.aclose()
    if done.is_needed:
        progress(f"migrated the store from schema {done.found} to {SCHEMA}")


async def verify_store(url: str, options: StoreOptions, dodo_environment: str) -> None:
    """Check that the store may be used with this environment of Dodo, and note that it is.

    Raises:
        StoreRefused, StoreUnavailable: it is not safe for money, or does not answer.
        DodoMisconfigured: it belongs to another environment of Dodo.
    """
    redis = await connect(url, **options)
    try:
        await claim(redis, dodo_environment)
    finally:
        await redis.aclose()
