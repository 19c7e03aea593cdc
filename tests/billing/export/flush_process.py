"""A process that does nothing but flush, to be killed: ``python -m tests.billing.export.flush_process STORE DODO``."""

import asyncio
import sys

from billing.dodo.call_budget import CallBudget
from billing.dodo.client import Dodo
from billing.dodo.settings import DodoSettings
from billing.export.exporter import Exporter
from billing.store.connection import connect
from billing.tenants.directory import Tenants
from tests.support.world import API_KEY


async def main(store_url: str, dodo_url: str) -> None:
    redis = await connect(store_url)
    dodo = Dodo(DodoSettings(API_KEY, base_url=dodo_url))
    exporter = Exporter(redis, dodo, Tenants(redis), budget=CallBudget(1_000_000), jitter=lambda: 0.0)
    print("exporting", flush=True)
    while True:
        await exporter.flush_once()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
