"""The worked tables of ``billing/ledger/README.md``, run: each row there is what a real store answers here."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from redis.asyncio import Redis

import billing.ledger
from billing.errors import Refusal
from billing.ledger.account import Clawback, Funding, Grant, Progress, Receipt
from billing.ledger.ledger import Ledger
from billing.money import Nanos
from billing.store.keys import shard_for
from billing.usage import RequestId, Unit
from tests.support.clock import SteppedClock
from tests.support.samples import ACME, allowance, request, settlement

README = Path(billing.ledger.__file__).parent / "README.md"
SHARD = shard_for(ACME)
PERIOD_MS = 10_000


class Table:
    """Rows as the README has them: a step, its reply, the new entries, and what is there after it."""

    def __init__(self, store: Redis, ledger: Ledger, columns: tuple[str, ...], funding: Funding | None = None) -> None:
        self.store, self.ledger, self.columns, self.funding = store, ledger, columns, funding
        self.rows: list[str] = []
        self._entries = 0

    async def add(self, step: str, reply: object) -> None:
        cells = [step, str(reply), await self._new_entries()]
        buckets = {**await self.store.hgetall(SHARD.retired(ACME)), **await self.store.hgetall(SHARD.buckets(ACME))}
        account = await self.store.hgetall(SHARD.account(ACME))
        now = await self.ledger.account(ACME, self.funding)
        for column in self.columns:
            if column == "open":
                cells.append(account.get("open", "0"))
            elif column == "exposure":
                cells.append(f"{int(account.get('overage', 0)):,}/{int(account.get('overage_held', 0)):,}")
            elif column == "available":
                cells.append(f"{now.available_nanos:,}")
            else:
                cells.append(_amounts(buckets, column if column != "allowance" else self._allowance()))
        self.rows.append(f"| {' | '.join(cells)} |")

    def _allowance(self) -> str:
        assert self.funding is not None
        assert self.funding.allowance is not None
        return self.funding.allowance.id

    async def _new_entries(self) -> str:
        entries = await self.store.xrange(SHARD.stream)
        new, self._entries = entries[self._entries :], len(entries)
        said = []
        for _, fields in new:
            payload = json.loads(fields["p"])
            amount = payload["charged_nanos"] if fields["k"] == "usage" else payload["amount"]
            said.append(f"{fields['k']} {payload['seq']}, {amount:,}, {payload['balance_nanos']:,}")
        return "; ".join(said) or "-"

    def check(self) -> None:
        rows = "\n".join(self.rows)
        assert f"|\n{rows}\n\n" in README.read_text() + "\n", f"the README has another table than\n{rows}"


def _amounts(buckets: Mapping[str, str], name: str) -> str:
    if name not in buckets:
        return "-"
    _, remaining, held, *_ = buckets[name].split("|")
    return f"{int(remaining):,}/{int(held):,}"


def _drawn(draws: tuple[object, ...]) -> str:
    named = {"overage": "exposure"}
    parts = [(named.get(draw.bucket, draw.bucket.partition(":")[0]), draw.amount) for draw in draws]  # type: ignore[attr-defined]
    return " + ".join(f"{amount:,} {name.replace('payment', 'pack')}" for name, amount in parts) or "-"


async def _settled(ledger: Ledger, request_id: str, completion: int) -> Receipt:
    return await ledger.settle(settlement(request_id, completion))


async def test_prepaid_table(store: Redis, ledger: Ledger) -> None:
    table, prepaid = Table(store, ledger, ("payment:1", "open")), {"max_tokens": 20}
    await table.add(
        "grant payment:1 100,000", "new" if await ledger.grant(Grant("payment:1", ACME, Unit.NANOS, 100_000)) else ""
    )
    stepped = request("req_1", step_tokens=4, **prepaid)
    hold = await ledger.hold(stepped)
    await table.add("hold req_1, a step of 4 tokens", f"{hold.held_nanos:,}; {hold.max_tokens} tokens affordable")
    await table.add("extend req_1 to 30,000", f"{await ledger.extend(stepped, Nanos(30_000), Nanos(20_000)):,}")
    receipt = await _settled(ledger, "req_1", 7)
    await table.add("settle req_1, 7 tokens", f"charged {receipt.record.charged_nanos:,}")
    receipt = await _settled(ledger, "req_1", 7)
    await table.add("settle req_1 again", f"the same record {receipt.record.seq}" if receipt.is_repeat else "")
    await table.add("hold req_2", f"{(await ledger.hold(request('req_2'))).held_nanos:,}")
    await ledger.void(RequestId("req_2"), ACME)
    await table.add("void req_2", "charged 0, failed")
    await table.add("hold req_3", f"{(await ledger.hold(request('req_3'))).held_nanos:,}")
    so_far = settlement("req_3", 2)
    await ledger.checkpoint([Progress(so_far.request_id, ACME, so_far.usage, so_far.list_nanos)])
    await table.add("checkpoint req_3, 2 tokens", f"list {so_far.list_nanos:,}")
    await store.zadd(SHARD.leases, {"req_3": 1})
    await table.add("lease over: expire", f"{await ledger.expire()} expired")
    receipt = await _settled(ledger, "req_3", 5)
    await table.add("settle req_3 late, 5 tokens", f"`{receipt.record.record_id}`, {receipt.record.charged_nanos:,}")
    with pytest.raises(Refusal) as refused:
        await ledger.hold(request("req_4", prompt_tokens=60))
    await table.add("hold req_4, 60 prompt tokens", type(refused.value).__name__)
    table.check()


async def test_allowance_and_overage_table(store: Redis, ledger: Ledger, clock: SteppedClock) -> None:
    def period(number: int) -> Funding:
        ends = clock.now_ms + PERIOD_MS
        return Funding(allowance(f"allowance:sub_1:{number}:pro", 30_000, ends), Nanos(40_000))

    table = Table(store, ledger, ("allowance", "payment:1", "exposure", "available"), period(1))
    assert table.funding is not None
    await ledger.grant(Grant("payment:1", ACME, Unit.NANOS, 5_000))
    await table.add("grant payment:1 5,000", "-")
    for request_id, asked, delivered in (("req_1", 20, 15), ("req_2", 10, 5)):
        hold = await ledger.hold(request(request_id, funding=table.funding, max_tokens=asked))
        await table.add(f"hold {request_id}, {asked} tokens", _drawn(hold.draws))
        if request_id == "req_2":
            with pytest.raises(Refusal) as refused:
                await ledger.hold(request("req_3", funding=table.funding))
            await table.add("hold req_3", type(refused.value).__name__)
        receipt = await _settled(ledger, request_id, delivered)
        await table.add(f"settle {request_id}, {delivered} tokens", _drawn(receipt.record.draws))
    hold = await ledger.hold(request("req_3", funding=table.funding))
    await table.add("hold req_3", f"{_drawn(hold.draws)}, clamped to {hold.max_tokens} tokens")
    await ledger.void(RequestId("req_3"), ACME)
    await table.add("void req_3", "-")
    clock.now_ms += PERIOD_MS
    table.funding = period(2)
    await ledger.repay_overage("payment:2", ACME, 25_000)
    await table.add("next period; repay payment:2 25,000", "-")
    hold = await ledger.hold(request("req_4", funding=table.funding, max_tokens=10))
    await table.add("hold req_4, 10 tokens", _drawn(hold.draws))
    receipt = await _settled(ledger, "req_4", 5)
    await table.add("settle req_4, 5 tokens", _drawn(receipt.record.draws))
    table.check()


async def test_clawback_table(store: Redis, ledger: Ledger) -> None:
    table = Table(store, ledger, ("payment:1", "payment:2", "available"))
    dispute = Clawback("dispute:1", ACME, "payment:1", 100_000)
    await ledger.grant(Grant("payment:1", ACME, Unit.NANOS, 100_000))
    await table.add("grant payment:1 100,000", "new")
    await ledger.hold(request())
    await _settled(ledger, "req_1", 15)
    await table.add("hold and settle req_1, 15 tokens", "charged 40,000")
    for again in ("", " again"):
        await table.add(f"claw back dispute:1 100,000{again}", f"{await ledger.claw_back(dispute):,} taken")
    with pytest.raises(Refusal) as refused:
        await ledger.hold(request("req_2", funding=Funding(credit_limit=Nanos(40_000))))
    await table.add("hold req_2, though credit would be extended", type(refused.value).__name__)
    taken = await ledger.claw_back(Clawback("refund:2", ACME, "payment:2", 20_000))
    await table.add("claw back refund:2 20,000, before its payment", f"{taken:,} taken; it waits")
    await ledger.grant(Grant("payment:2", ACME, Unit.NANOS, 80_000))
    await table.add("grant payment:2 80,000", "new")
    for again in ("", " again"):
        given = await ledger.restore(dispute)
        await table.add(f"dispute won: restore dispute:1{again}", f"{given:,} given")
    table.check()
