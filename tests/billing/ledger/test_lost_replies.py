"""The store did it and its answer never came: the client asks again, and it counts once."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import pytest

from billing.ledger.ledger import Ledger
from billing.store.connection import connect
from cluster import valkey
from tests.support.samples import ACME, FREE, money, request, settlement


class LossyProxy:
    """Passes everything on, and cuts the connection in place of every answer it is told to lose."""

    def __init__(self, store: str) -> None:
        self._store = store
        self.to_lose = 0
        self.lost = 0
        self.served: set[asyncio.Task[None]] = set()

    def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.served.add(asyncio.create_task(self.serve(reader, writer)))

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answers, asks = await asyncio.open_unix_connection(self._store)
        passing = asyncio.create_task(self._pass_on(reader, asks))
        with suppress(ConnectionError):
            while answer := await answers.read(65_536):
                if self.to_lose:
                    self.to_lose, self.lost = self.to_lose - 1, self.lost + 1
                    break
                writer.write(answer)
                await writer.drain()
        passing.cancel()
        for end in (writer, asks):
            end.close()
            with suppress(ConnectionError):
                await end.wait_closed()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while ask := await reader.read(65_536):
            writer.write(ask)
            await writer.drain()
        writer.close()


@pytest.fixture
async def proxy(server: valkey.Valkey, tmp_path: Path) -> AsyncIterator[LossyProxy]:
    lossy = LossyProxy(server.url.removeprefix("unix://"))
    listening = await asyncio.start_unix_server(lossy.accept, tmp_path / "p")
    yield lossy
    listening.close()
    await asyncio.gather(*lossy.served)


async def test_every_movement_counts_once_although_its_reply_was_lost(proxy: LossyProxy, tmp_path: Path) -> None:
    redis = await connect(f"unix://{tmp_path / 'p'}")
    await redis.flushall()
    ledger = Ledger(redis)
    await ledger.grant(money(1, "payment:0"))
    await ledger.hold(request("req_0", price=FREE))
    await ledger.settle(settlement("req_0"))  # the scripts are in the store now: what is lost is an answer of theirs
    proxy.to_lose = 1
    assert not await ledger.grant(money(100_000)), "the repeat says that it was granted before"
    proxy.to_lose = 1
    hold = await ledger.hold(request())
    proxy.to_lose = 1
    receipt = await ledger.settle(settlement())
    account = await ledger.account(ACME)
    assert proxy.lost == 3
    assert (hold.balance_nanos, receipt.record.charged_nanos, receipt.is_repeat) == (50_001, 20_000, True)
    assert (account.balance_nanos, account.held_nanos, account.seq) == (80_001, 0, 4)
    await redis.aclose()
