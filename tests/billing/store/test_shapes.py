"""The same ledger on one server, behind sentinels and on a cluster; each fails closed in time and comes back."""

import asyncio
import shutil
import signal
import subprocess
import time
from collections.abc import Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis
from redis.crc import key_slot

from billing.export.outbox import Outbox
from billing.ledger.errors import CreditOnHold
from billing.ledger.ledger import Ledger
from billing.pricing.prices import Price
from billing.store.address import Node, Shape, parse
from billing.store.connection import _refuse_old, connect, verify
from billing.store.errors import StoreRefused, StoreUnavailable
from billing.store.guard import guarded
from billing.store.keys import ALL_SHARDS, shard_for, shard_of
from billing.store.primary import pool
from billing.usage import TenantId
from tests.support.fleet import HOST, Fleet, Server, cluster, durable, free_port, wait_until, watched
from tests.support.samples import money, request, settlement
from tests.support.servers import SYSTEM_REDIS

pytestmark = pytest.mark.prompt
IN_TIME_S = 0.3
SLACK_S = 0.7
"""What a busy test machine may add to it; a call that waits without bound takes five seconds."""
TENANTS = [TenantId(f"tenant_{n}") for n in range(24)]
"""Enough for each of three nodes to have some."""


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with cluster(tmp_path_factory.mktemp("c")) as fleet:
        yield fleet


@pytest.fixture
async def store(nodes: Fleet) -> Any:
    redis = await connect(nodes.url)
    await redis.flushall()
    yield redis
    await redis.aclose()


@pytest.mark.parametrize(
    ("url", "shape", "nodes", "service"),
    [
        ("redis://h", Shape.SINGLE, [("h", 6379)], ""),
        ("rediss://u:p%40@h:1/2", Shape.SINGLE, [("h", 1)], ""),
        ("unix:///run/s.sock", Shape.SINGLE, [], ""),
        ("redis+sentinel://a:1,b/ledger", Shape.SENTINEL, [("a", 1), ("b", 26379)], "ledger"),
        ("rediss+sentinel://u:p@a,b/ledger/3?ssl_ca_certs=/ca", Shape.SENTINEL, [("a", 26379), ("b", 26379)], "ledger"),
        ("redis+cluster://:p@a:1,b", Shape.CLUSTER, [("a", 1), ("b", 6379)], ""),
    ],
)
def test_an_address_says_its_shape(url: str, shape: Shape, nodes: list[tuple[str, int]], service: str) -> None:
    address = parse(url)
    assert (address.shape, list(address.nodes), address.service) == (shape, [Node(*n) for n in nodes], service)


def test_an_address_carries_its_logins() -> None:
    address = parse("redis+sentinel://u:p@a/ledger/3?sentinel_password=s&ssl_check_hostname=false")
    assert (address.options["username"], address.options["password"], address.options["db"]) == ("u", "p", 3)
    assert address.sentinel_options == {"password": "s", "ssl_check_hostname": False}
    assert "sentinel_password" not in address.options


@pytest.mark.parametrize(
    "url",
    [
        "http://:secret@h",
        "redis+sentinel://:secret@h",
        "redis+cluster://:secret@h/0",
        "redis+cluster://:secret@",
        "redis://:secret@h:port",
        "redis+http://:secret@h",
        "unix+cluster://:secret@h",
        "",
    ],
)
def test_an_address_of_no_known_form_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(StoreRefused, match="its forms are") as refusal:
        parse(url)
    assert "secret" not in str(refusal.value)


@pytest.mark.parametrize(
    ("info", "is_refused"),
    [
        ({"redis_version": "6.0.16"}, True),
        ({"redis_version": "6.2.0"}, False),
        ({"redis_version": "7.2.4", "valkey_version": "7.2.9"}, True),
        ({"redis_version": "7.2.4", "valkey_version": "8.0.0"}, False),
    ],
)
def test_a_store_that_is_too_old_is_refused(info: dict[str, str], is_refused: bool) -> None:
    if not is_refused:
        return _refuse_old("the store", info)
    with pytest.raises(StoreRefused, match=r"Redis 6\.2 or Valkey 8\.0"):
        _refuse_old("the store", info)
    return None


async def test_every_movement_works_on_a_cluster_whichever_node_has_its_shard(store: Redis) -> None:
    ledger = Ledger(store)
    for number, tenant in enumerate(TENANTS):
        await ledger.grant(replace(money(100_000, f"payment:{number}"), tenant=tenant))
        await ledger.hold(replace(request(f"req_{number}", lease_ms=1), tenant=tenant))
    assert await ledger.open_holds() == len(TENANTS)
    for number, tenant in enumerate(TENANTS[:12]):
        await ledger.settle(replace(settlement(f"req_{number}"), tenant=tenant))
    await asyncio.sleep(0.01)
    assert await ledger.expire() == 12
    assert (await Outbox(store).backlog()).unsealed_entries == 3 * len(TENANTS) - len(TENANTS)
    balances = [(await ledger.account(tenant)).balance_nanos for tenant in TENANTS]
    assert balances == [80_000] * 12 + [100_000] * 12


async def test_an_address_of_one_node_finds_its_cluster(nodes: Fleet, store: Redis) -> None:
    redis = await connect(f"redis://{HOST}:{nodes.servers[2].port}")
    await asyncio.gather(*(Ledger(redis).account(tenant) for tenant in TENANTS))
    await redis.aclose()


@pytest.mark.parametrize("url", ["redis+sentinel://{}/ledger", "redis+cluster://{}", "redis://{}"])
async def test_a_store_that_is_not_there_is_unavailable_and_says_why(url: str) -> None:
    with pytest.raises(StoreUnavailable, match=r"[Cc]onnect call failed"):
        await connect(url.format(f"{HOST}:{free_port()}"))


async def test_a_wrong_password_of_a_cluster_is_told(nodes: Fleet) -> None:
    with pytest.raises(StoreUnavailable, match="password"):
        await connect(nodes.url.replace("://", "://nobody:secret@"))


async def test_a_crowd_cannot_overspend_on_a_cluster(store: Redis) -> None:
    ledger = Ledger(store)
    await ledger.grant(money(50 * 100_000))
    price = Price.model_validate({"per_request": "0.0001"})
    answers = await asyncio.gather(
        *(ledger.hold(request(f"req_{n}", price=price)) for n in range(1_000)), return_exceptions=True
    )
    assert [type(answer) for answer in answers].count(CreditOnHold) == 950


async def test_a_hung_node_refuses_its_own_tenants_in_time_and_nobody_else(nodes: Fleet, store: Redis) -> None:
    ledger = Ledger(store)
    for number, tenant in enumerate(TENANTS):
        await ledger.grant(replace(money(100_000, f"payment:{number}"), tenant=tenant))
    nodes.servers[0].send(signal.SIGSTOP)
    try:
        waits = await asyncio.gather(*(_wait(ledger.account(tenant)) for tenant in TENANTS for _ in range(5)))
    finally:
        nodes.servers[0].send(signal.SIGCONT)
    hung = {t for t in TENANTS if key_slot(shard_for(t).tag.encode()) < 16_384 // 3}
    for (is_answered, seconds), tenant in zip(waits, [t for t in TENANTS for _ in range(5)], strict=True):
        assert is_answered == (tenant not in hung)
        assert is_answered or seconds < IN_TIME_S + SLACK_S
    await _until_served(ledger, TENANTS)


async def test_a_shard_that_moves_to_another_node_is_followed(nodes: Fleet, store: Redis) -> None:
    ledger, tenant = Ledger(store), TENANTS[0]
    slot = key_slot(ALL_SHARDS[shard_of(tenant)].tag.encode())
    owner = next(n for n in range(3) if slot < (n + 1) * 16_384 // 3)
    source, target = nodes.servers[owner], nodes.servers[(owner + 1) % 3]
    source_id, target_id = (str(server.client.execute_command("CLUSTER", "MYID")) for server in (source, target))
    target.client.execute_command("CLUSTER", "SETSLOT", slot, "IMPORTING", source_id)
    source.client.execute_command("CLUSTER", "SETSLOT", slot, "MIGRATING", target_id)
    async with guarded():
        await store.set(shard_for(tenant).tenant(tenant), "x")
        assert await store.get(shard_for(tenant).tenant(tenant)) == "x", "asked where it is being moved to"
    with pytest.raises(StoreUnavailable, match="rehashing"):
        await ledger.grant(replace(money(100_000), tenant=tenant))
    for server in (target, source):
        server.client.execute_command("CLUSTER", "SETSLOT", slot, "NODE", target_id)
    await ledger.grant(replace(money(100_000), tenant=tenant))
    await ledger.hold(replace(request(), tenant=tenant))
    assert await ledger.open_holds() == 1
    await store.flushall()
    for server in (source, target):
        server.client.execute_command("CLUSTER", "SETSLOT", slot, "NODE", source_id)
    await _until_served(ledger, TENANTS)


async def test_each_primary_of_a_cluster_must_be_durable(nodes: Fleet, store: Redis) -> None:
    nodes.servers[1].client.config_set("appendfsync", "everysec")
    try:
        with pytest.raises(StoreRefused, match=f"{nodes.servers[1].port}.*not on disk"):
            await verify(store)
        await verify(store, "trusted")
    finally:
        nodes.servers[1].client.config_set("appendfsync", "always")
    await verify(store)


async def test_sentinels_name_the_new_primary(tmp_path: Path) -> None:
    with watched(tmp_path, sentinels=1) as fleet:
        redis = await connect(fleet.url)
        ledger = Ledger(redis)
        await ledger.grant(money(100_000))
        await asyncio.to_thread(_in_step, fleet.servers[1])
        fleet.servers[0].kill()
        is_answered, seconds = await _wait(ledger.account(TENANTS[0]))
        assert (is_answered, seconds < IN_TIME_S + SLACK_S) == (False, True)
        await _until_served(ledger, [TENANTS[0]])
        assert (await ledger.account(money(1).tenant)).balance_nanos == 100_000
        await ledger.hold(request())
        await redis.aclose()


async def test_a_primary_that_only_hung_and_was_replaced_is_written_to_by_nobody(tmp_path: Path) -> None:
    """It comes back believing that it is the primary still; idle connections would lead to it."""
    with watched(tmp_path, sentinels=1) as fleet:
        old, new = fleet.servers
        redis = await connect(fleet.url)
        ledger = Ledger(redis)
        await ledger.grant(money(100_000))
        await asyncio.gather(*(ledger.account(tenant) for tenant in TENANTS))
        await asyncio.to_thread(_in_step, new)
        old.send(signal.SIGSTOP)
        is_answered, seconds = await _wait(ledger.account(TENANTS[0]))
        assert (is_answered, seconds < IN_TIME_S + SLACK_S) == (False, True)
        await _until_served(ledger, [TENANTS[0]])
        old.send(signal.SIGCONT)
        await asyncio.gather(*(ledger.grant(money(1, f"payment:{n}")) for n in range(2, 32)))
        assert new.client.hlen(shard_for(money(1).tenant).buckets(money(1).tenant)) == 31
        await redis.aclose()


async def test_a_demoted_primary_is_left_for_the_new_one(tmp_path: Path) -> None:
    """A service that moves an address sends nobody away: the old connections go on answering READONLY."""
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


needs_tls = pytest.mark.skipif(
    not (SYSTEM_REDIS.exists() and shutil.which("openssl")), reason="needs a server built with TLS, and openssl"
)


@needs_tls
async def test_a_store_with_password_and_tls_is_reached_by_its_certificate(tmp_path: Path) -> None:
    server = _with_tls(tmp_path).start()
    address = f"rediss://:s3cret@{HOST}:{server.port}/0?ssl_ca_certs={tmp_path}/cert.pem"
    try:
        redis = await _patiently(address)
        await Ledger(redis).grant(money(100_000))
        await redis.aclose()
        for wrong in (address.replace("s3cret", "other"), address.partition("?")[0], "redis" + address[6:]):
            with pytest.raises((StoreUnavailable, StoreRefused)) as refusal:
                await connect(wrong)
            assert "s3cret" not in str(refusal.value)
    finally:
        server.kill()


def _with_tls(folder: Path) -> Server:
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -keyout key.pem -out cert.pem -subj /CN=localhost"
    subprocess.run(
        [*command.split(), "-addext", f"subjectAltName=IP:{HOST}"], cwd=folder, check=True, capture_output=True
    )
    server = durable(folder / "t", SYSTEM_REDIS, requirepass="s3cret", tls_auth_clients="no")
    words = [word if word != "--port" else "--tls-port" for word in server.command]
    for option, file in (("--tls-cert-file", "cert.pem"), ("--tls-key-file", "key.pem")):
        words += [option, str(folder / file)]
    server.command = [*words, "--port", "0"]
    return server


async def _patiently(url: str) -> Redis:
    for _ in range(100):
        try:
            return await connect(url)
        except StoreUnavailable:
            await asyncio.sleep(0.05)
    return await connect(url)


def _in_step(replica: Server) -> None:
    wait_until(lambda: bool(replica.client.dbsize()), "a replica with data")


async def _wait(call: Coroutine[Any, Any, object]) -> tuple[bool, float]:
    started = time.monotonic()
    try:
        await call
    except StoreUnavailable:
        return False, time.monotonic() - started
    return True, time.monotonic() - started


async def _until_served(ledger: Ledger, tenants: list[TenantId], patience_s: float = 10.0) -> None:
    deadline = time.monotonic() + patience_s
    for tenant in tenants:
        while True:
            try:
                await ledger.account(tenant)
                break
            except StoreUnavailable:
                assert time.monotonic() < deadline, "the store is back and nobody uses it"
                await asyncio.sleep(0.05)
