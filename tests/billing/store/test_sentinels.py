"""The store behind sentinels: after a failover the new primary is used, and the old one never again."""

import asyncio
import signal
from pathlib import Path

import pytest
from redis.asyncio import Redis

from billing.ledger.ledger import Ledger
from billing.store.address import Node
from billing.store.connection import connect
from billing.store.keys import shard_for
from billing.store.primary import pool
from billing.usage import TenantId
from tests.support.fleet import HOST, PROMPT_S, Server, answered, durable, until_served, wait_until, watched
from tests.support.samples import money, request

pytestmark = pytest.mark.prompt
TENANTS = [TenantId(f"tenant_{n}") for n in range(24)]


async def test_new_primary_is_used_after_failover(tmp_path: Path) -> None:
    with watched(tmp_path, sentinels=1) as fleet:
        redis = await connect(fleet.url)
        ledger = Ledger(redis)
        await ledger.grant(money(100_000))
        await asyncio.to_thread(_await_data, fleet.servers[1])
        fleet.servers[0].kill()
        is_answered, seconds = await answered(ledger.account(TENANTS[0]))
        assert (is_answered, seconds < PROMPT_S) == (False, True)
        await until_served(ledger, [TENANTS[0]])
        assert (await ledger.account(money(1).tenant)).balance_nanos == 100_000
        await ledger.hold(request())
        await redis.aclose()


async def test_replaced_primary_is_not_written_to(tmp_path: Path) -> None:
    """It only hung, and comes back as a primary; idle connections would lead to it."""
    with watched(tmp_path, sentinels=1) as fleet:
        old, new = fleet.servers
        redis = await connect(fleet.url)
        ledger = Ledger(redis)
        await ledger.grant(money(100_000))
        await asyncio.gather(*(ledger.account(tenant) for tenant in TENANTS))
        await asyncio.to_thread(_await_data, new)
        old.send(signal.SIGSTOP)
        is_answered, seconds = await answered(ledger.account(TENANTS[0]))
        assert (is_answered, seconds < PROMPT_S) == (False, True)
        await until_served(ledger, [TENANTS[0]])
        old.send(signal.SIGCONT)
        await asyncio.gather(*(ledger.grant(money(1, f"payment:{n}")) for n in range(2, 32)))
        assert new.client.hlen(shard_for(money(1).tenant).buckets(money(1).tenant)) == 31
        await redis.aclose()


async def test_demoted_primary_is_left_for_the_new_one(tmp_path: Path) -> None:
    """Where a service moves an address, old connections stay open and answer READONLY."""
    first, second = durable(tmp_path / "a").start().await_answer(), durable(tmp_path / "b").start().await_answer()
    ports = iter([first.port, second.port])
    try:

        async def find() -> Node:
            return Node(HOST, next(ports))

        redis = Redis.from_pool(pool({}, find))
        await redis.set("fb:x", "1")
        first.client.execute_command("REPLICAOF", HOST, second.port)
        assert await redis.set("fb:x", "2")
        assert second.client.get("fb:x") == "2"
        await redis.aclose()
    finally:
        first.kill()
        second.kill()


def _await_data(replica: Server) -> None:
    wait_until(lambda: bool(replica.client.dbsize()), "a replica with data")
