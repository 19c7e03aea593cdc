"""A store that is gone, hung or unfit is told apart from a slow one, in time."""

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis.asyncio import Redis

from billing.ledger.errors import CreditOnHold
from billing.ledger.ledger import Ledger
from billing.pricing.prices import Price
from billing.store import keys
from billing.store.connection import connect, guarded, verify
from billing.store.errors import StoreRefused, StoreUnavailable
from cluster import valkey
from tests.support.samples import ACME, money, request, settlement

IN_TIME_S = 0.3
SLACK_S = 0.2
"""What a busy test machine may add to it."""


@pytest.fixture
def own_server(server: valkey.Valkey, tmp_path: Path) -> Iterator[valkey.Valkey]:
    """A server of this test's own, of each kind, to be hurt."""
    started = valkey.start(tmp_path / "s", _program(server))
    yield started
    started.kill()


@pytest.mark.prompt
async def test_a_refused_connection_is_unavailable_in_time(own_server: valkey.Valkey) -> None:
    redis = await connect(own_server.url)
    ledger = Ledger(redis)
    await ledger.grant(money(100_000))
    own_server.kill()
    for call in (ledger.hold(request()), ledger.settle(settlement()), ledger.account(ACME)):
        assert await _time_to_fail(call) < IN_TIME_S + SLACK_S
    await redis.aclose()
    with pytest.raises(StoreUnavailable):
        await connect(own_server.url)


@pytest.mark.prompt
async def test_a_hung_store_is_unavailable_in_time_and_answers_nobody_wrongly_after(
    own_server: valkey.Valkey,
) -> None:
    redis = await connect(own_server.url)
    ledger = Ledger(redis)
    await ledger.grant(money(1_000_000))
    await asyncio.gather(*(ledger.account(ACME) for _ in range(10)))
    os.kill(own_server.pid, signal.SIGSTOP)
    try:
        waits = await asyncio.gather(*(_time_to_fail(ledger.hold(request(f"req_{n}"))) for n in range(10)))
    finally:
        os.kill(own_server.pid, signal.SIGCONT)
    assert max(waits) < IN_TIME_S + SLACK_S
    holds = await asyncio.gather(*(ledger.hold(request(f"req_{n}")) for n in range(10)))
    assert [h.request.request_id for h in holds] == [f"req_{n}" for n in range(10)]
    account = await ledger.account(ACME)
    assert (account.open_holds, account.held_nanos) == (10, 500_000)
    await redis.aclose()


async def test_a_store_that_comes_back_is_used_again(own_server: valkey.Valkey, tmp_path: Path) -> None:
    redis = await connect(own_server.url)
    ledger = Ledger(redis)
    await ledger.grant(money(100_000))
    own_server.kill()
    await _time_to_fail(ledger.account(ACME))
    again = valkey.start(tmp_path / "s", _program(own_server))
    try:
        assert (await ledger.account(ACME)).balance_nanos == 100_000
        await ledger.hold(request())
    finally:
        await redis.aclose()
        again.kill()


def _program(server: valkey.Valkey) -> Path:
    """It is known by the name it was called with: one binary is server and checker at once."""
    command = server.process.args
    assert isinstance(command, list)
    return Path(str(command[0]))


async def _time_to_fail(call: object) -> float:
    started = time.monotonic()
    with pytest.raises(StoreUnavailable):
        await call  # type: ignore[misc]
    return time.monotonic() - started


async def test_a_crowd_larger_than_the_pool_waits_its_turn(ledger: Ledger) -> None:
    await ledger.grant(money(50 * 100_000))
    price = Price.model_validate({"per_request": "0.0001"})
    answers = await asyncio.gather(
        *(ledger.hold(request(f"req_{n}", price=price)) for n in range(1_000)), return_exceptions=True
    )
    refusals = [answer for answer in answers if isinstance(answer, BaseException)]
    assert len(refusals) == 950
    assert {type(refusal) for refusal in refusals} == {CreditOnHold}


@pytest.mark.prompt
async def test_a_process_that_slept_does_not_blame_the_store(store: Redis) -> None:
    async def look() -> str:
        async with guarded():
            return str(await store.ping())

    looking = asyncio.create_task(look())
    await asyncio.sleep(0)
    time.sleep(0.6)  # noqa: ASYNC251
    assert await looking == "True"


async def test_a_cancelled_call_ends(ledger: Ledger) -> None:
    """Python 3.11's ``wait_for`` swallowed one cancellation in a few hundred: a gateway then never stopped."""

    async def look_for_ever() -> None:
        while True:
            await ledger.account(ACME)

    for n in range(400):
        looking = asyncio.create_task(look_for_ever())
        await asyncio.sleep(n / 400_000)
        looking.cancel()
        done, _ = await asyncio.wait({looking}, timeout=1)
        assert looking in done


async def test_a_full_store_takes_no_hold_and_still_settles(store: Redis, ledger: Ledger) -> None:
    await ledger.grant(money(1_000_000))
    await ledger.hold(request())
    await store.config_set("maxmemory", "1")
    try:
        with pytest.raises(StoreUnavailable):
            await ledger.hold(request("req_2"))
        assert (await ledger.settle(settlement())).record.charged_nanos == 20_000
    finally:
        await store.config_set("maxmemory", "0")
    assert (await ledger.account(ACME)).held_nanos == 0


@pytest.mark.parametrize(
    ("option", "bad", "good", "word"),
    [
        ("maxmemory-policy", "allkeys-lru", "noeviction", "evicts"),
        ("appendonly", "no", "yes", "no log"),
        ("appendfsync", "everysec", "always", "not on disk"),
        ("appendfsync", "no", "always", "not on disk"),
    ],
)
async def test_a_store_that_could_lose_money_is_refused_unless_trusted(
    store: Redis, option: str, bad: str, good: str, word: str
) -> None:
    await store.config_set(option, bad)
    try:
        with pytest.raises(StoreRefused, match=word):
            await verify(store)
        await verify(store, "trusted")
    finally:
        await store.config_set(option, good)
    await verify(store)


async def test_a_store_that_hides_when_it_writes_is_refused_unless_trusted(store: Redis, server: valkey.Valkey) -> None:
    await store.acl_setuser(
        "hosted", enabled=True, passwords=["+pw"], keys=["*"], categories=["+@all"], commands=["-config"]
    )
    url = server.url.replace("unix://", "unix://hosted:pw@")
    try:
        with pytest.raises(StoreRefused, match="durability: trusted"):
            await connect(url)
        await (await connect(url, durability="trusted")).aclose()
    finally:
        await store.acl_deluser("hosted")


async def test_a_store_of_another_layout_is_refused(store: Redis) -> None:
    await store.hset(keys.META, "shards", "32")
    with pytest.raises(StoreRefused, match="REDIS_URL"):
        await verify(store, "trusted")
    await store.delete(keys.META)


async def test_a_mistake_of_ours_is_not_taken_for_an_outage(store: Redis) -> None:
    await store.set("fb:text", "x")
    with pytest.raises(Exception, match="WRONGTYPE"):
        async with guarded():
            await store.hget("fb:text", "field")
