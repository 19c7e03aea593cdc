"""A store that is absent, hung or unfit is refused in time; one that is only slow is not."""

import asyncio
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
from redis.asyncio import Redis

from billing.ledger.errors import CreditOnHold
from billing.ledger.ledger import Ledger
from billing.pricing.prices import Price
from billing.store.connection import connect, verify, verify_server
from billing.store.errors import StoreRefused, StoreUnavailable
from billing.store.guard import guarded
from cluster import valkey
from tests.support.fleet import HOST, Server, durable, free_port, time_to_fail
from tests.support.samples import ACME, money, request, settlement
from tests.support.servers import SYSTEM_REDIS

IN_TIME_S = 0.5
"""A silent store is given up within 0.3 s; the rest is for a busy test machine."""


@pytest.fixture
def own_server(server: valkey.Valkey, tmp_path: Path) -> Iterator[valkey.Valkey]:
    """A server of this test's own, of each kind."""
    started = valkey.start(tmp_path / "s", _program(server))
    yield started
    started.kill()


@pytest.mark.prompt
async def test_refused_connection_is_unavailable_in_time(own_server: valkey.Valkey) -> None:
    redis = await connect(own_server.url)
    ledger = Ledger(redis)
    await ledger.grant(money(100_000))
    own_server.kill()
    for call in (ledger.hold(request()), ledger.settle(settlement()), ledger.account(ACME)):
        assert await time_to_fail(call) < IN_TIME_S
    await redis.aclose()
    with pytest.raises(StoreUnavailable):
        await connect(own_server.url)


@pytest.mark.prompt
async def test_hung_store_is_unavailable_in_time_and_then_answers_each_call(
    own_server: valkey.Valkey,
) -> None:
    redis = await connect(own_server.url)
    ledger = Ledger(redis)
    await ledger.grant(money(1_000_000))
    await asyncio.gather(*(ledger.account(ACME) for _ in range(10)))
    os.kill(own_server.pid, signal.SIGSTOP)
    try:
        waits = await asyncio.gather(*(time_to_fail(ledger.hold(request(f"req_{n}"))) for n in range(10)))
    finally:
        os.kill(own_server.pid, signal.SIGCONT)
    assert max(waits) < IN_TIME_S
    holds = await asyncio.gather(*(ledger.hold(request(f"req_{n}")) for n in range(10)))
    assert [h.request.request_id for h in holds] == [f"req_{n}" for n in range(10)]
    account = await ledger.account(ACME)
    assert (account.open_holds, account.held_nanos) == (10, 500_000)
    await redis.aclose()


async def test_restarted_store_is_used_again(own_server: valkey.Valkey, tmp_path: Path) -> None:
    redis = await connect(own_server.url)
    ledger = Ledger(redis)
    await ledger.grant(money(100_000))
    own_server.kill()
    await time_to_fail(ledger.account(ACME))
    again = valkey.start(tmp_path / "s", _program(own_server))
    try:
        assert (await ledger.account(ACME)).balance_nanos == 100_000
        await ledger.hold(request())
    finally:
        await redis.aclose()
        again.kill()


def _program(server: valkey.Valkey) -> Path:
    """The name that the server was called with, because one binary is server and checker at once."""
    command = server.process.args
    assert isinstance(command, list)
    return Path(str(command[0]))


async def test_more_calls_than_connections_wait_their_turn(ledger: Ledger) -> None:
    await ledger.grant(money(50 * 100_000))
    price = Price.model_validate({"per_request": "0.0001"})
    answers = await asyncio.gather(
        *(ledger.hold(request(f"req_{n}", price=price)) for n in range(1_000)), return_exceptions=True
    )
    refusals = [answer for answer in answers if isinstance(answer, BaseException)]
    assert len(refusals) == 950
    assert {type(refusal) for refusal in refusals} == {CreditOnHold}


@pytest.mark.prompt
async def test_suspended_process_does_not_take_the_store_for_down(store: Redis) -> None:
    async def look() -> str:
        async with guarded():
            return str(await store.ping())

    looking = asyncio.create_task(look())
    await asyncio.sleep(0)
    time.sleep(0.6)  # noqa: ASYNC251
    assert await looking == "True"


async def test_cancelled_call_ends(ledger: Ledger) -> None:
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


async def test_full_store_refuses_holds_and_settles(store: Redis, ledger: Ledger) -> None:
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
async def test_lossy_store_is_refused_unless_trusted(store: Redis, option: str, bad: str, good: str, word: str) -> None:
    await store.config_set(option, bad)
    try:
        with pytest.raises(StoreRefused, match=word):
            await verify(store)
        await verify(store, "trusted")
    finally:
        await store.config_set(option, good)
    await verify(store)


async def test_store_that_denies_config_is_refused_unless_trusted(store: Redis, server: valkey.Valkey) -> None:
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


async def test_error_of_a_wrong_command_is_not_unavailable(store: Redis) -> None:
    await store.set("fb:text", "x")
    with pytest.raises(Exception, match="WRONGTYPE"):
        async with guarded():
            await store.hget("fb:text", "field")


class _Server:
    """A server whose version is what it says."""

    def __init__(self, info: dict[str, str]) -> None:
        self._info = info

    async def info(self) -> dict[str, str]:
        return self._info


@pytest.mark.parametrize(
    ("info", "is_refused"),
    [
        ({"redis_version": "6.0.16"}, True),
        ({"redis_version": "6.2.0"}, False),
        ({"redis_version": "7.2.4", "valkey_version": "7.2.9"}, True),
        ({"redis_version": "7.2.4", "valkey_version": "8.0.0"}, False),
    ],
)
async def test_old_server_is_refused(info: dict[str, str], is_refused: bool) -> None:
    expected = pytest.raises(StoreRefused, match=r"Redis 6\.2 or Valkey 8\.0") if is_refused else nullcontext()
    with expected:
        await verify_server(_Server(info), "trusted")  # type: ignore[arg-type]


@pytest.mark.parametrize("url", ["redis+sentinel://{}/ledger", "redis+cluster://{}", "redis://{}"])
async def test_absent_store_is_unavailable_with_the_reason(url: str) -> None:
    with pytest.raises(StoreUnavailable, match=r"[Cc]onnect call failed"):
        await connect(url.format(f"{HOST}:{free_port()}"))


needs_tls = pytest.mark.skipif(
    not (SYSTEM_REDIS.exists() and shutil.which("openssl")), reason="needs a server built with TLS, and openssl"
)


@needs_tls
async def test_store_with_password_and_tls_is_reached(tmp_path: Path) -> None:
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
