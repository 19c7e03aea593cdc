"""Any sequence of movements, each sent again at any time, leaves the ledger where a plain model says."""

import asyncio
from collections.abc import Coroutine
from typing import ClassVar, TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from billing.account import Bucket, Clawback, Funding, Grant, Progress, Settlement
from billing.errors import BillingError, CreditOnHold, DuplicateRequest, InsufficientCredits, UnknownHold
from billing.money import Nanos
from billing.prices import Price
from billing.store.connection import connect
from billing.store.holds import Ledger
from billing.store.keys import shard_for
from billing.usage import OVERAGE, BucketId, RequestId, Status, Unit, Usage, UsageRecord
from cluster import valkey
from tests.billing.conftest import SteppedClock
from tests.billing.ledger_model import FOREVER, Model, Pot
from tests.billing.samples import ACME, request

T = TypeVar("T")
PERIOD = 1_000
ALLOWANCE = 30
PER_TOKEN = Price.model_validate({"output_per_1m": "0.001"})
"""One nano for each completion token: amounts read as tokens."""
IDS = st.sampled_from([f"req_{n}" for n in range(10)])
SOURCES = st.sampled_from([f"payment:{n}" for n in range(6)])
AMOUNTS = st.integers(0, 60)
REFUSALS = {CreditOnHold: "on_hold", InsufficientCredits: "insufficient"}


class LedgerMachine(RuleBasedStateMachine):
    url: ClassVar[str]

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.redis = self.run(connect(self.url, durability="trusted"))
        self.clock = SteppedClock(10 * PERIOD)
        self.ledger = Ledger(self.redis, self.clock)
        self.model = Model(self.clock.now_ms)
        self.asked: dict[str, tuple[int, str, int, bool]] = {}
        self.refunds: dict[str, int] = {}
        self.repaid: set[str] = set()

    def run(self, work: Coroutine[None, None, T]) -> T:
        return self.loop.run_until_complete(work)

    def teardown(self) -> None:
        try:
            self.check_the_books()
        finally:
            self.run(self.redis.aclose())
            self.loop.close()

    @initialize()
    def empty(self) -> None:
        self.run(self.redis.flushall())

    @rule(
        rid=IDS,
        tokens=st.sampled_from([1, 5, 20, 25, 30, 60]),
        model=st.sampled_from(["pirate", "yaml"]),
        cap=st.sampled_from([0, 50]),
        is_doomed=st.booleans(),
    )
    def hold(self, rid: str, tokens: int, model: str, cap: int, is_doomed: bool) -> None:
        known = rid in self.model.open or rid in self.model.expired or rid in self.model.settled
        asked = (tokens, model, cap, is_doomed)
        got = self.try_to_hold(rid, *asked)
        if not known:
            self.put_allowance()
            expected = self.model.hold(rid, tokens, 1, model, cap, is_doomed)
            assert got == expected
            self.asked[rid] = asked
        elif rid in self.model.open and self.asked[rid][:2] == asked[:2]:
            assert got == "held"
        else:
            assert got == "duplicate"

    def try_to_hold(self, rid: str, tokens: int, model: str, cap: int, is_doomed: bool) -> str:
        funding = Funding(self.allowance(), Nanos(cap))
        asked = request(
            rid,
            price=PER_TOKEN,
            prompt_tokens=0,
            max_tokens=tokens,
            model=model,
            adapter=model,
            funding=funding,
            lease_ms=1 if is_doomed else 600_000,
        )
        try:
            hold = self.run(self.ledger.hold(asked))
        except DuplicateRequest:
            return "duplicate"
        except BillingError as refusal:
            return REFUSALS[type(refusal)]
        assert 1 <= hold.max_tokens <= tokens
        return "held"

    def allowance(self) -> Bucket:
        period = self.clock.now_ms // PERIOD
        name = BucketId(f"allowance:{period}")
        return Bucket(name, Unit.NANOS, ALLOWANCE, ALLOWANCE, (period + 1) * PERIOD, is_allowance=True)

    def put_allowance(self) -> None:
        bucket = self.allowance()
        if bucket.id not in self.model.pots:
            ends = bucket.expires_at_ms or FOREVER
            self.model.pots[bucket.id] = Pot("nanos", ALLOWANCE, 0, ends, is_allowance=True, granted=ALLOWANCE)

    @rule(rid=IDS, cost=AMOUNTS, calls=st.integers(0, 1))
    def settle(self, rid: str, cost: int, calls: int) -> None:
        usage = Usage(completion_tokens=cost, requests=calls)
        settlement = Settlement(RequestId(rid), ACME, usage, Nanos(cost), Status.COMPLETE)
        try:
            receipt = self.run(self.ledger.settle(settlement))
        except UnknownHold:
            assert rid not in self.model.open.keys() | self.model.expired.keys() | self.model.settled.keys()
            return
        if rid in self.model.open:
            self.model.settled[rid] = self.model.close(rid, cost, calls)
            self.model.expired.pop(rid)
        elif rid in self.model.expired:
            self.model.settled[rid] = self.model.close_late(rid, cost, calls)
            self.model.expired.pop(rid)
        else:
            assert receipt.is_repeat
        assert receipt.record.charged_nanos == self.model.settled[rid]

    @precondition(lambda self: self.model.expired)
    @rule(data=st.data(), cost=AMOUNTS, calls=st.integers(0, 1))
    def settle_late(self, data: st.DataObject, cost: int, calls: int) -> None:
        self.settle(data.draw(st.sampled_from(sorted(self.model.expired))), cost, calls)

    @precondition(lambda self: self.model.open)
    @rule(data=st.data(), cost=AMOUNTS, calls=st.integers(0, 1))
    def checkpoint_open(self, data: st.DataObject, cost: int, calls: int) -> None:
        self.checkpoint(data.draw(st.sampled_from(sorted(self.model.open))), cost, calls)

    @rule(data=st.data(), refund=st.integers(0, 3), amount=st.integers(1, 90))
    def claw_back_granted(self, data: st.DataObject, refund: int, amount: int) -> None:
        granted = sorted(i for i in self.model.pots if i.startswith("payment"))
        self.claw_back(refund, data.draw(st.sampled_from(granted or ["payment:0"])), amount)

    @rule(rid=IDS, cost=AMOUNTS, calls=st.integers(0, 1))
    def checkpoint(self, rid: str, cost: int, calls: int) -> None:
        usage = Usage(completion_tokens=cost, requests=calls)
        gone = self.run(self.ledger.checkpoint([Progress(RequestId(rid), ACME, usage, Nanos(cost))]))
        assert gone == (frozenset() if rid in self.model.open else {rid})
        if rid in self.model.open and cost >= self.model.open[rid].cost:
            self.model.open[rid].cost, self.model.open[rid].calls = cost, calls

    @rule()
    def expire(self) -> None:
        self.run(asyncio.sleep(0.004))
        doomed = [rid for rid, opened in self.model.open.items() if opened.is_doomed]
        assert self.run(self.ledger.expire()) == len(doomed)
        for rid in doomed:
            self.model.close(rid, self.model.open[rid].cost, self.model.open[rid].calls)

    @rule(source=SOURCES, days=st.sampled_from([0, 1, 3]))
    def grant(self, source: str, days: int) -> None:
        number = int(source[-1])
        unit, amount = (Unit.REQUESTS, 3) if number % 3 == 2 else (Unit.NANOS, 20 * number + 5)
        scope = ("pirate",) if number == 5 else ()
        ends = self.clock.now_ms + days * PERIOD // 2 if days else None
        is_new = self.run(self.ledger.grant(Grant(source, ACME, unit, amount, ends, scope)))
        assert is_new == (source not in self.model.pots)
        if is_new:
            pot = Pot(unit, amount, 0, ends or FOREVER, ",".join(scope), granted=amount)
            self.model.grant(source, pot)

    @rule(refund=st.integers(0, 3), granted_by=SOURCES, amount=st.integers(1, 40))
    def claw_back(self, refund: int, granted_by: str, amount: int) -> None:
        source = f"refund:{granted_by}:{refund}:{amount}"
        taken = self.run(self.ledger.claw_back(Clawback(source, ACME, granted_by, amount)))
        if source in self.refunds:
            assert taken == self.refunds[source]
        elif granted_by in self.model.pots:
            self.refunds[source] = self.model.claw_back(granted_by, amount)
            assert taken == self.refunds[source]
        else:
            self.model.owed.setdefault(granted_by, []).append(amount)
            self.refunds[source] = 0
            assert taken == 0

    @rule(number=st.integers(0, 3), nanos=AMOUNTS)
    def repay(self, number: int, nanos: int) -> None:
        source = f"invoice:{number}:{nanos}"
        assert self.run(self.ledger.repay_overage(source, ACME, nanos)) == (source not in self.repaid)
        if source not in self.repaid:
            self.model.overage -= min(nanos, self.model.overage)
            self.repaid.add(source)

    @rule(ms=st.sampled_from([1, PERIOD // 2, PERIOD]))
    def time_passes(self, ms: int) -> None:
        self.clock.now_ms += ms
        self.model.now = self.clock.now_ms

    @invariant()
    def the_account_is_what_the_model_says(self) -> None:
        account, model = self.run(self.ledger.account(ACME)), self.model
        assert (account.balance_nanos, account.held_nanos) == (model.balance(), model.held())
        assert (account.overage_nanos, account.open_holds) == (model.overage, len(model.open))
        assert account.held_requests == sum(o.unit == "requests" for o in model.open.values())
        there = {b.id: b.remaining for b in account.buckets if b.remaining}
        assert there == {i: p.left for unit in Unit for i, p in model.live(unit) if p.left}

    def check_the_books(self) -> None:
        """Of each unit: left + held + spent = granted - taken back; numbers without gaps; nothing twice."""
        shard = shard_for(ACME)
        entries = [fields for _, fields in self.run(self.redis.xrange(shard.stream))]
        records = [UsageRecord.from_json(e["p"]) for e in entries if e["k"] == "usage"]
        assert len({r.record_id for r in records}) == len(records)
        assert sum(r.charged_nanos for r in records) == self.model.spent
        assert self.run(self.ledger.account(ACME)).seq == len(entries)
        stored = list(self.run(self.redis.hgetall(shard.buckets(ACME))).values())
        stored += self.run(self.redis.hgetall(shard.retired(ACME))).values()
        draws = [draw for record in records for draw in record.draws if draw.bucket != OVERAGE]
        spent = {unit: sum(draw.amount for draw in draws if draw.unit is unit) for unit in Unit}
        for letter, unit in (("n", Unit.NANOS), ("r", Unit.REQUESTS)):
            fields = [text.split("|") for text in stored if text.startswith(letter)]
            assert sum(int(f[1]) + int(f[2]) for f in fields) + spent[unit] == sum(int(f[3]) for f in fields)


def drive(url: str, examples: int, steps: int, machine: type[LedgerMachine] = LedgerMachine) -> None:
    """Run the machine against the store at ``url``, whatever its shape; it is emptied."""
    machine.url = url
    limits = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(machine, settings=limits)


def test_the_ledger_does_what_the_model_says(server: valkey.Valkey) -> None:
    async def relax(policy: str) -> None:
        redis = await connect(server.url, durability="trusted")
        await redis.config_set("appendfsync", policy)
        await redis.aclose()

    asyncio.run(relax("no"))
    try:
        drive(server.url, examples=100, steps=30)
    finally:
        asyncio.run(relax("always"))
