"""Any sequence of movements, each sent again at any time, leaves the ledger where a plain model says."""

import asyncio
from collections import Counter
from collections.abc import Collection, Coroutine
from dataclasses import replace
from typing import ClassVar, TypeVar
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from redis.asyncio import Redis

from billing.errors import BillingError
from billing.ledger.account import Adjustment, Bucket, Clawback, Funding, Grant, HoldRequest, Progress, Settlement
from billing.ledger.errors import CreditOnHold, DuplicateRequest, GrantRefused, InsufficientCredits, UnknownHold
from billing.ledger.ledger import Ledger
from billing.money import Nanos
from billing.pricing.prices import Price
from billing.store.connection import connect
from billing.store.guard import guarded
from billing.store.keys import Shard, shard_for
from billing.usage import OVERAGE, BucketId, RequestId, Status, TenantId, Unit, Usage, UsageRecord
from cluster import valkey
from tests.support.clock import SteppedClock
from tests.support.ledger_model import FOREVER, Model, Open, Pot
from tests.support.samples import ACME, request

T = TypeVar("T")
PERIOD = 1_000
ALLOWANCE = 30
PER_TOKEN = Price.model_validate({"output_per_1m": "0.001"})
"""One nano for each completion token: amounts read as tokens."""
IDS = st.sampled_from([f"req_{n}" for n in range(6)])
SOURCES = st.sampled_from([f"payment:{n}" for n in range(6)])
AMOUNTS = st.integers(0, 60)
CALLS = st.integers(0, 1)
REFUSALS = {
    CreditOnHold: "on_hold",
    InsufficientCredits: "insufficient",
    DuplicateRequest: "duplicate",
    UnknownHold: "unknown",
}
PATIENCE_S = 10.0
"""For a store on a machine that others keep busy: what is asked here is not how soon it answers."""
SHARD = shard_for(ACME)


class SuspiciousLedger(Ledger):
    """Takes some holds for overdue whose lease was renewed since it looked."""

    suspects: tuple[str, ...] = ()

    async def _overdue(self, limit: int) -> list[tuple[Shard, RequestId, TenantId]]:
        return [*await super()._overdue(limit), *((SHARD, RequestId(rid), ACME) for rid in self.suspects)]


class LedgerMachine(RuleBasedStateMachine):
    loop: ClassVar[asyncio.AbstractEventLoop]
    redis: ClassVar[Redis]

    def __init__(self) -> None:
        super().__init__()
        self.clock = SteppedClock(10 * PERIOD)
        self.ledger = SuspiciousLedger(self.redis, self.clock)
        self.model = Model(self.clock.now_ms)
        self.asked: dict[str, tuple[int, int, str, int]] = {}
        self.settled: dict[str, int] = {}
        self.refunds: dict[str, int] = {}
        self.restored: dict[str, int] = {}
        self.repaid: set[str] = set()
        self.spent = 0
        self.rested_ms = 0

    def run(self, work: Coroutine[None, None, T]) -> T:
        return self.loop.run_until_complete(work)

    def teardown(self) -> None:
        self.check_the_books()

    @initialize()
    def empty(self) -> None:
        self.run(self.redis.flushall())

    @rule(
        rid=IDS,
        tokens=st.sampled_from([1, 5, 20, 30, 60]),
        step=st.sampled_from([5, 25, 60]),
        model=st.sampled_from(["pirate", "yaml"]),
        cap=st.sampled_from([0, 50]),
    )
    def hold(self, rid: str, tokens: int, step: int, model: str, cap: int) -> None:
        got, affords = self.try_to_hold(rid, tokens, step, model, cap)
        if rid in self.model.open and (tokens, model) == (self.asked[rid][0], self.asked[rid][2]):
            assert got == "held"
        elif rid in self.model.open or rid in self.model.expired or rid in self.settled:
            assert got == "duplicate"
        else:
            before = dict(self.model.pots)
            self.put_allowance()
            opened = Open("nanos", cap, self.allowance().id)
            reach = min(tokens, self.model.reach(opened, ()))
            assert got == self.model.hold(rid, opened, min(tokens, step), model)
            if got == "held":
                self.asked[rid] = (tokens, step, model, cap)
                assert affords == (tokens if opened.unit == "requests" else reach)
            else:
                self.model.pots = before

    def try_to_hold(self, rid: str, tokens: int, step: int, model: str, cap: int) -> tuple[str, int]:
        try:
            return "held", self.run(self.ledger.hold(self.request(rid, tokens, step, model, cap))).max_tokens
        except BillingError as refusal:
            return REFUSALS[type(refusal)], 0

    def request(self, rid: str, tokens: int, step: int, model: str, cap: int) -> HoldRequest:
        funding = Funding(self.allowance(), Nanos(cap))
        sizes = {"prompt_tokens": 0, "max_tokens": tokens, "step_tokens": step}
        return request(rid, price=PER_TOKEN, model=model, adapter=model, funding=funding, lease_ms=600_000, **sizes)

    def allowance(self) -> Bucket:
        period = (self.clock.now_ms - self.rested_ms) // PERIOD
        name = BucketId(f"allowance:{period}")
        ends = (period + 1) * PERIOD + self.rested_ms
        return Bucket(name, Unit.NANOS, ALLOWANCE, ALLOWANCE, ends, is_allowance=True)

    def put_allowance(self) -> None:
        bucket = self.allowance()
        pot = self.model.pots.get(bucket.id) or Pot("nanos", ALLOWANCE, is_allowance=True)
        self.model.pots[bucket.id] = replace(pot, ends=bucket.expires_at_ms or 0)

    @rule(rid=IDS, total=st.sampled_from([0, 10, 30, 60]), least=st.sampled_from([0, 10, 30]))
    def extend(self, rid: str, total: int, least: int) -> None:
        opened = self.model.open.get(rid)
        expected = "unknown" if opened is None else self.model.extend(opened, total, least)
        for _ in range(2):
            assert self.try_to_extend(rid, total, least) == (
                expected,
                opened.parts.total() if expected == "held" else 0,
            )

    def try_to_extend(self, rid: str, total: int, least: int) -> tuple[str, int]:
        try:
            return "held", self.run(self.ledger.extend(self.request(rid, 0, 0, "", 0), Nanos(total), Nanos(least)))
        except BillingError as refusal:
            return REFUSALS[type(refusal)], 0

    @precondition(lambda self: self.model.open)
    @rule(data=st.data(), total=st.sampled_from([20, 40, 60]), least=AMOUNTS)
    def extend_open(self, data: st.DataObject, total: int, least: int) -> None:
        self.extend(data.draw(st.sampled_from(sorted(self.model.open))), total, min(least, total))

    @rule(rid=IDS, cost=AMOUNTS, calls=CALLS)
    def settle(self, rid: str, cost: int, calls: int) -> None:
        usage = Usage(completion_tokens=cost, requests=calls)
        settlement = Settlement(RequestId(rid), ACME, usage, Nanos(cost), Status.COMPLETE)
        try:
            receipt = self.run(self.ledger.settle(settlement))
        except UnknownHold:
            assert rid not in self.model.open.keys() | self.model.expired.keys() | self.settled.keys()
            return
        is_repeat = rid in self.settled
        if not is_repeat:
            end = self.model.close if rid in self.model.open else self.model.close_late
            self.settled[rid] = end(rid, {"nanos": cost, "requests": calls})
            self.spent += self.settled[rid]
            del self.model.expired[rid]
        assert (receipt.is_repeat, receipt.record.charged_nanos) == (is_repeat, self.settled[rid])

    @precondition(lambda self: self.model.open or self.model.expired)
    @rule(data=st.data(), cost=AMOUNTS, calls=CALLS)
    def settle_known(self, data: st.DataObject, cost: int, calls: int) -> None:
        known = sorted(self.model.expired) or sorted(self.model.open)
        self.settle(data.draw(st.sampled_from(known)), cost, calls)

    @rule(rid=IDS, cost=AMOUNTS, calls=CALLS)
    def checkpoint(self, rid: str, cost: int, calls: int) -> None:
        usage = Usage(completion_tokens=cost, requests=calls)
        gone = self.run(self.ledger.checkpoint([Progress(RequestId(rid), ACME, usage, Nanos(cost))]))
        assert gone == (frozenset() if rid in self.model.open else {rid})
        if rid in self.model.open and cost >= self.model.open[rid].used["nanos"]:
            self.model.open[rid].used = Counter(nanos=cost, requests=calls)

    @precondition(lambda self: self.model.open)
    @rule(data=st.data(), cost=AMOUNTS, calls=CALLS)
    def checkpoint_open(self, data: st.DataObject, cost: int, calls: int) -> None:
        self.checkpoint(data.draw(st.sampled_from(sorted(self.model.open))), cost, calls)

    @precondition(lambda self: self.model.open)
    @rule(data=st.data())
    def expire(self, data: st.DataObject) -> None:
        rid = data.draw(st.sampled_from(sorted(self.model.open)))
        self.ledger.suspects = tuple(self.model.open.keys() - {rid})
        self.run(self.redis.zadd(SHARD.leases, {rid: 1}, xx=True))
        assert self.run(self.ledger.expire()) == 1
        self.spent += self.model.close(rid, self.model.open[rid].used)

    @rule(source=SOURCES, days=st.sampled_from([0, 1, 3]))
    def grant(self, source: str, days: int) -> None:
        number = int(source[-1])
        unit, amount = (Unit.REQUESTS, 3) if number % 3 == 2 else (Unit.NANOS, 20 * number + 5)
        scope = ("pirate",) if number == 5 else ()
        ends = self.clock.now_ms + days * PERIOD // 2 if days else None
        is_new = self.run(self.ledger.grant(Grant(source, ACME, unit, amount, ends, scope)))
        assert is_new == (source not in self.model.pots)
        if is_new:
            self.model.fill(source, Pot(unit, amount, ends or FOREVER, ",".join(scope)))

    @rule(unit=st.sampled_from(Unit), amount=st.sampled_from([-40, -2, 1, 30]))
    def adjust(self, unit: Unit, amount: int) -> None:
        source = f"adjustment:{unit}:{amount}"
        is_new = self.run(self.ledger.adjust(Adjustment(source, ACME, unit, amount, "miscounted")))
        assert is_new == (source not in self.model.pots)
        if is_new:
            self.model.fill(source, Pot(unit, amount))

    @rule(refund=st.integers(0, 1), granted_by=SOURCES, amount=st.sampled_from([10, 90]))
    def claw_back(self, refund: int, granted_by: str, amount: int) -> None:
        source = f"refund:{granted_by}:{refund}:{amount}"
        taken = self.run(self.ledger.claw_back(Clawback(source, ACME, granted_by, amount)))
        if source not in self.refunds:
            self.model.reversals.setdefault(granted_by, []).append(amount)
            self.refunds[source] = self.model.reverse(granted_by)
        assert taken == self.refunds[source]

    @rule(refund=st.integers(0, 1), granted_by=SOURCES, amount=st.sampled_from([10, 90]))
    def restore(self, refund: int, granted_by: str, amount: int) -> None:
        """A dispute that is won, as often as that is told."""
        source = f"refund:{granted_by}:{refund}:{amount}"
        clawback = Clawback(source, ACME, granted_by, amount)
        if source not in self.refunds:
            with pytest.raises(GrantRefused):
                self.run(self.ledger.restore(clawback))
            return
        given = self.run(self.ledger.restore(clawback))
        if source not in self.restored:
            self.model.reversals[granted_by].remove(amount)
            self.model.reverse(granted_by)
            self.restored[source] = given
        assert given == self.restored[source] <= amount

    @rule(number=st.integers(0, 1), nanos=st.sampled_from([5, 50]))
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

    @rule(ms=st.sampled_from([PERIOD // 2, 2 * PERIOD]))
    def rest(self, ms: int) -> None:
        """A pause: time passes, and the period ends later by as much."""
        self.rested_ms += ms
        self.time_passes(ms)

    @invariant()
    def the_account_is_what_the_model_says(self) -> None:
        account, model = self.run(self.ledger.account(ACME)), self.model
        held = model.held(o for o in model.open.values() if o.unit == "nanos")
        assert (account.balance_nanos, account.held_nanos) == (
            sum(p.left for _, p in model.live("nanos")),
            held.total(),
        )
        assert (account.overage_nanos, account.open_holds) == (model.overage, len(model.open))
        assert account.held_requests == sum(o.unit == "requests" for o in model.open.values())
        there = {b.id: b.remaining for b in account.buckets if b.remaining}
        assert there == {i: p.left for unit in Unit for i, p in model.live(unit) if p.left}

    def check_the_books(self) -> None:
        """Of each unit: left + held + spent = granted - taken back; numbers without gaps; nothing twice."""
        entries = [fields for _, fields in self.run(self.redis.xrange(SHARD.stream))]
        records = [UsageRecord.from_json(e["p"]) for e in entries if e["k"] == "usage"]
        assert len({r.record_id for r in records}) == len(records)
        assert sum(r.charged_nanos for r in records) == self.spent
        assert self.run(self.ledger.account(ACME)).seq == len(entries)
        stored = list(self.run(self.redis.hgetall(SHARD.buckets(ACME))).values())
        stored += self.run(self.redis.hgetall(SHARD.retired(ACME))).values()
        draws = [draw for record in records for draw in record.draws if draw.bucket != OVERAGE]
        spent = {unit: sum(draw.amount for draw in draws if draw.unit is unit) for unit in Unit}
        for letter, unit in (("n", Unit.NANOS), ("r", Unit.REQUESTS)):
            fields = [text.split("|") for text in stored if text.startswith(letter)]
            assert sum(int(f[1]) + int(f[2]) for f in fields) + spent[unit] == sum(int(f[3]) for f in fields)


def relax(url: str, policy: str = "no") -> None:
    """How often the store syncs its log: a machine that kills nothing needs no disk."""

    async def set_policy() -> None:
        redis = await connect(url, durability="trusted")
        await redis.config_set("appendfsync", policy)
        await redis.aclose()

    asyncio.run(set_policy())


def drive(
    url: str,
    examples: int,
    steps: int,
    machine: type[LedgerMachine] = LedgerMachine,
    phases: Collection[Phase] = tuple(Phase),
) -> None:
    """Run the machine against the store at ``url``, whatever its shape; it is emptied."""
    machine.loop = asyncio.new_event_loop()
    machine.redis = machine.loop.run_until_complete(connect(url, durability="trusted"))
    limits = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=phases,
    )
    try:
        with patch("billing.ledger.ledger.guarded", lambda *_: guarded(PATIENCE_S)):
            run_state_machine_as_test(machine, settings=limits)
    finally:
        machine.loop.run_until_complete(machine.redis.aclose())
        machine.loop.close()


@pytest.mark.slow
def test_the_ledger_does_what_the_model_says(server: valkey.Valkey) -> None:
    relax(server.url)
    try:
        drive(server.url, examples=400, steps=40)
    finally:
        relax(server.url, "always")
