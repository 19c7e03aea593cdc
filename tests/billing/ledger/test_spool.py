"""Settlements that outlive the store and the process that made them."""

import asyncio
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis.asyncio import Redis

from billing.ledger.account import Grant, Settlement
from billing.ledger.codec import pack_settlement
from billing.ledger.ledger import Ledger
from billing.ledger.spool import REFUSED, UNREADABLE_LINES, Spool, SpoolFull
from billing.money import Nanos
from billing.store.connection import connect
from billing.store.errors import StoreUnavailable
from billing.store.keys import shard_for
from billing.usage import NOTHING, RequestId, Status
from cluster import valkey
from tests.support.samples import ACME, calls, money, request, settlement


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Spool]:
    opened = Spool(tmp_path / "spool", max_pending=100)
    yield opened
    opened.close()


async def test_what_waits_is_settled_once_and_forgotten(ledger: Ledger, spool: Spool, tmp_path: Path) -> None:
    await ledger.grant(money(1_000_000))
    for n in range(5):
        await ledger.hold(request(f"req_{n}"))
        spool.append(settlement(f"req_{n}"))
    await ledger.settle(settlement("req_0"))
    assert spool.pending == 5
    assert await spool.replay(ledger) == 5
    assert (spool.pending, (await ledger.account(ACME)).balance_nanos) == (0, 900_000)
    assert await spool.replay(ledger) == 0
    assert not (tmp_path / "spool" / REFUSED).exists()


WITHDRAWN = Settlement(RequestId("req_1"), ACME, NOTHING, Nanos(0), Status.FAILED, is_undelivered=True)
"""An answer that was not delivered, after a settle whose reply was lost."""


@pytest.mark.parametrize("credit", [money(100_000), calls(3)])
async def test_what_was_charged_and_never_delivered_is_given_back_once(
    ledger: Ledger, spool: Spool, credit: Grant
) -> None:
    await ledger.grant(credit)
    await ledger.hold(request())
    charged = await ledger.settle(settlement())
    for _ in range(2):
        spool.append(WITHDRAWN)
    assert await spool.replay(ledger) == 2
    account = await ledger.account(ACME)
    assert sum(bucket.remaining for bucket in account.buckets) == credit.amount
    assert charged.record.draws


async def test_what_was_withdrawn_in_time_gives_nothing_back(ledger: Ledger, spool: Spool) -> None:
    await ledger.grant(money(100_000))
    await ledger.hold(request())
    for _ in range(2):
        spool.append(WITHDRAWN)
    assert await spool.replay(ledger) == 2
    assert (await ledger.account(ACME)).balance_nanos == 100_000
    assert (await ledger.settle(settlement())).record.charged_nanos == 0


async def test_while_the_store_is_away_everything_goes_on_waiting(spool: Spool, tmp_path: Path) -> None:
    server = valkey.start(tmp_path / "s")
    redis = await connect(server.url)
    ledger = Ledger(redis)
    await ledger.grant(money(1_000_000))
    for n in range(3):
        await ledger.hold(request(f"req_{n}"))
    server.kill()
    for n in range(3):
        with pytest.raises(StoreUnavailable):
            await ledger.settle(settlement(f"req_{n}"))
        spool.append(settlement(f"req_{n}"))
    with pytest.raises(StoreUnavailable):
        await spool.replay(ledger)
    assert spool.pending == 3
    again = valkey.start(tmp_path / "s")
    assert await spool.replay(ledger) == 3
    account = await ledger.account(ACME)
    assert (account.balance_nanos, account.open_holds) == (940_000, 0)
    await redis.aclose()
    again.kill()


async def test_settle_that_the_ledger_refuses_is_kept_for_the_operator(
    ledger: Ledger, spool: Spool, tmp_path: Path
) -> None:
    spool.append(settlement("req_never_held"))
    assert await spool.replay(ledger) == 1
    assert spool.pending == 0
    assert "req_never_held" in (tmp_path / "spool" / REFUSED).read_text()
    assert (spool.refused, spool.unreadable) == (1, 0)


async def test_settlement_of_an_unreadable_hold_waits_and_holds_up_nothing(
    ledger: Ledger, spool: Spool, store: Redis
) -> None:
    """Nobody refused it: it is settled once the hold is as it was."""
    await ledger.grant(money(1_000_000))
    for name in ("req_bad", "req_good"):
        await ledger.hold(request(name))
        spool.append(settlement(name))
    holds = shard_for(ACME).holds
    hold = str(await store.hget(holds, "req_bad"))
    await store.hset(holds, "req_bad", "no JSON")
    assert await spool.replay(ledger) == 1
    assert (spool.pending, spool.refused, spool.unreadable) == (1, 0, 0)
    assert (await ledger.settle(settlement("req_good"))).is_repeat
    await store.hset(holds, "req_bad", hold)
    assert await spool.replay(ledger) == 0, "not at every run"
    spool._retry_at.clear()
    assert await spool.replay(ledger) == 1
    assert (spool.pending, (await ledger.account(ACME)).balance_nanos) == (0, 960_000)


async def test_quantities_that_cannot_be_are_set_aside_and_hold_up_nothing(
    ledger: Ledger, spool: Spool, tmp_path: Path
) -> None:
    await ledger.grant(money(1_000_000))
    await ledger.hold(request())
    assert spool.refused == 0
    odd = pack_settlement(settlement("req_odd")).replace('"completion_tokens":5', '"completion_tokens":-5')
    spool._file.append([odd])
    spool._pending += 1
    spool.append(settlement())
    assert await spool.replay(ledger) == 2
    assert (spool.pending, spool.refused, spool.unreadable) == (0, 0, 1)
    assert "AssertionError" in (tmp_path / "spool" / UNREADABLE_LINES).read_text()
    assert (await ledger.account(ACME)).balance_nanos == 980_000


async def test_the_spool_is_bounded(tmp_path: Path) -> None:
    spool = Spool(tmp_path, max_pending=2)
    spool.append(settlement("req_1"))
    spool.append(settlement("req_2"))
    with pytest.raises(SpoolFull):
        spool.append(settlement("req_3"))
    assert spool.pending == 2
    spool.close()


async def test_a_killed_process_s_settlements_are_taken_over_and_half_a_line_is_not(
    ledger: Ledger, tmp_path: Path
) -> None:
    await ledger.grant(money(1_000_000))
    await ledger.hold(request("req_1"))
    program = textwrap.dedent(f"""
        import os, signal
        from pathlib import Path
        from billing.ledger.spool import Spool
        from tests.support.samples import settlement
        spool = Spool(Path({str(tmp_path)!r}))
        spool.append(settlement("req_1"))
        spool._file.handle.write(b'{{"request_id":"req_2","ten')
        os.kill(os.getpid(), signal.SIGKILL)
    """)
    await asyncio.to_thread(subprocess.run, [sys.executable, "-c", program], check=False)
    spool = Spool(tmp_path)
    assert spool.pending == 1
    assert await spool.replay(ledger) == 1
    assert (await ledger.account(ACME)).balance_nanos == 980_000
    spool.close()
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".jsonl")]


async def test_a_living_process_keeps_its_own(ledger: Ledger, tmp_path: Path) -> None:
    await ledger.grant(money(1_000_000))
    await ledger.hold(request())
    mine = Spool(tmp_path)
    mine.append(settlement())
    other = Spool(tmp_path)
    assert other.pending == 0
    mine.close()
    assert await other.replay(ledger) == 1
    other.close()


def test_a_disk_that_fails_takes_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = Spool(tmp_path)
    spool.append(settlement("req_1"))

    def failing(_: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as broken:
        broken.setattr("os.fsync", failing)
        with pytest.raises(OSError, match="Input/output"):
            spool.append(settlement("req_2"))
    spool.append(settlement("req_3"))
    assert spool.pending == 2
    assert [line.split('"')[3] for line in spool._oldest()] == ["req_1", "req_3"]
    spool.close()
