"""Any course of movements, failures included, leaves the ledger where a plain model says."""

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Collection, Coroutine
from copy import deepcopy
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import ClassVar, TypeVar
from unittest.mock import patch

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

from billing.catalog.plans import Plan
from billing.errors import BillingError
from billing.ledger.account import Adjustment, Clawback, Funding, Grant, Hold, HoldRequest, Progress, Settlement
from billing.ledger.admission import funding_for
from billing.ledger.codec import snapshot_of
from billing.ledger.errors import (
    CreditOnHold,
    DuplicateRequest,
    GrantRefused,
    InsufficientCredits,
    SpendCapReached,
    UnknownHold,
    UnresolvedSettlement,
)
from billing.ledger.ledger import Ledger
from billing.money import Nanos
from billing.pricing.prices import Price
from billing.store.connection import connect
from billing.store.guard import guarded
from billing.store.keys import Shard, shard_for
from billing.tenants.spend_caps import SpendCap, Window
from billing.tenants.tenant import Subscription, SubscriptionStatus, Tenant
from billing.usage import RequestId, Status, TenantId, Unit, Usage, UsageRecord
from tests.support import ledger_model as model
from tests.support.clock import SteppedClock
from tests.support.failover import Replica, differences
from tests.support.ledger_model import FOREVER, Bucket, Cap, Charge, Model, Refusal
from tests.support.samples import ACME, request

T = TypeVar("T")
DAY_MS = 86_400_000
START_MS = 1_767_225_600_000
PERIOD_MS = 30 * DAY_MS
"""Of a subscription; a free plan's is the calendar month."""
WINDOW_MS = 20 * DAY_MS
PER_TOKEN = Price.model_validate({"output_per_1m": "0.001"})
"""One nano for each completion token: amounts read as tokens."""
PLANS = {
    name: Plan.model_validate(raw)
    for name, raw in {
        "prepaid": {"kind": "prepaid"},
        "free": {"kind": "free", "allowance": {"usd": "0.00000003"}},
        "trial": {"kind": "free", "allowance": {"usd": "0.000000045"}},
        "pro": {
            "kind": "subscription",
            "allowance": {"usd": "0.00000003"},
            "credit_limit": "0.00000005",
            "monthly_price": "0.00000002",
        },
        "calls": {
            "kind": "subscription",
            "allowance": {"requests": 2, "adapters": ["pirate"]},
            "monthly_price": "0.000000007",
        },
        "payg": {"kind": "pay_as_you_go", "credit_limit": "0.00000005"},
    }.items()
}
ALLOWANCES = {
    "free": Bucket(model.MONEY, 30, is_allowance=True),
    "trial": Bucket(model.MONEY, 45, is_allowance=True),
    "pro": Bucket(model.MONEY, 30, is_allowance=True, price=20, sold=30),
    "calls": Bucket(model.CALLS, 2, scope=("pirate",), is_allowance=True, price=7, sold=2),
}
PRICES = (0, 25, 9, 2**60, 0, 11)
"""Of each grant: given, as packs are, calls, for more than Lua can count, given, calls of some models."""
CREDIT_LIMITS = {"pro": 50, "payg": 50}
IDS = st.sampled_from([f"req_{n}" for n in range(6)])
SOURCES = st.sampled_from([f"payment:{n}" for n in range(6)])
AMOUNTS = st.integers(0, 60) | st.sampled_from([30, 60])
CALLS = st.integers(0, 1)
CAPS = st.sampled_from([0, 40, 100])
DEADLINE_S = 10.0
"""For each call: a busy machine may be slow, and the speed of the store is not under test."""
SHARD = shard_for(ACME)


def refusal_of(error: BillingError) -> Refusal:
    match error:
        case CreditOnHold():
            return Refusal("on_hold", error.balance_nanos, error.held_nanos)
        case InsufficientCredits():
            return Refusal("insufficient", error.balance_nanos, error.limit_source)
        case SpendCapReached():
            return Refusal("capped", error.spent_nanos)
        case DuplicateRequest():
            return Refusal("duplicate")
        case UnknownHold() | GrantRefused():
            return Refusal("unknown")
        case UnresolvedSettlement():
            return Refusal("unresolved")
    raise error


@dataclass
class Sent:
    """What a gateway has of a request, whatever the store loses."""

    asked: HoldRequest
    reply: Hold
    held: int
    """With all extensions that were acknowledged."""
    snapshot: model.Hold
    """The same for the model: the hold as it was at first."""


class StaleLedger(Ledger):
    """Tries to expire holds whose lease was renewed after it had looked for overdue ones."""

    renewed: tuple[str, ...] = ()

    async def _overdue(self, limit: int) -> list[tuple[Shard, RequestId, TenantId]]:
        return [*await super()._overdue(limit), *((SHARD, RequestId(rid), ACME) for rid in self.renewed)]


class LedgerMachine(RuleBasedStateMachine):
    loop: ClassVar[asyncio.AbstractEventLoop]
    redis: ClassVar[Redis]

    def __init__(self) -> None:
        super().__init__()
        self.clock = SteppedClock(START_MS)
        self.ledger = StaleLedger(self.redis, self.clock)
        self.replica = Replica(self.redis)
        self.model, self.replicated = Model(self.clock.now_ms), Model(self.clock.now_ms)
        self.sent: dict[str, Sent] = {}
        self.acknowledged: list[tuple[bool, Callable[[], object]]] = []
        """Since the replica caught up: whether it is a settlement or a repayment, and how to send it again."""
        self.plan = ""
        self.paused_ms = 0
        self.allowances: dict[tuple[str, int], str] = {}
        self.entries = 0

    def run(self, work: Coroutine[None, None, T]) -> T:
        return self.loop.run_until_complete(work)

    def ask(self, work: Coroutine[None, None, T]) -> T | Refusal:
        try:
            return self.run(work)
        except BillingError as error:
            return refusal_of(error)

    @initialize(plan=st.sampled_from(sorted(PLANS)))
    def begin(self, plan: str) -> None:
        self.run(self.redis.flushall())
        self.plan = plan

    # A plan and what it gives.

    @rule(plan=st.sampled_from(sorted(PLANS)))
    def join(self, plan: str) -> None:
        """Leave a plan for another, in the middle of a period."""
        self.plan = plan

    def funding(self) -> Funding:
        period = (self.clock.now_ms - START_MS - self.paused_ms) // PERIOD_MS
        subscription = Subscription(
            id="sub_1",
            plan=self.plan,
            status=SubscriptionStatus.ACTIVE,
            period_start_ms=START_MS + period * PERIOD_MS,
            period_end_ms=START_MS + (period + 1) * PERIOD_MS + self.paused_ms,
        )
        tenant = Tenant(id=ACME, email="acme@farebox.test", plan=self.plan, subscription=subscription)
        return funding_for(tenant, PLANS[self.plan], self.clock.now_ms)

    def asked(self, tokens: int, step: int, adapter: str, cap: int) -> tuple[HoldRequest, model.Request]:
        funding, now = self.funding(), self.clock.now_ms
        window = now - now % WINDOW_MS
        asked = request(
            price=PER_TOKEN,
            model=adapter,
            adapter=adapter,
            prompt_tokens=0,
            max_tokens=tokens,
            step_tokens=step,
            funding=funding,
            caps=(SpendCap(Window.DAY, window, Nanos(cap)),) if cap else (),
            lease_ms=600_000,
        )
        name, given = "", ALLOWANCES.get(self.plan)
        if given is not None:
            assert funding.allowance is not None
            name = self.name_of_allowance(funding.allowance.id)
            given = replace(given, ends=funding.allowance.expires_at_ms or 0, granted=given.remaining)
        limit = CREDIT_LIMITS.get(self.plan, 0)
        own_cap = Cap(window, cap) if cap else None
        return asked, model.Request(tokens, min(tokens, step), adapter, name, given, limit, own_cap)

    def name_of_allowance(self, bucket: str) -> str:
        """The bucket's own name, unless that stands for another plan's or period's allowance already."""
        now = datetime.fromtimestamp(self.clock.now_ms / 1000, UTC)
        is_monthly = PLANS[self.plan].kind == "free"
        paid = (self.clock.now_ms - START_MS - self.paused_ms) // PERIOD_MS
        period = now.year * 12 + now.month if is_monthly else paid
        taken = bucket in self.allowances.values()
        return self.allowances.setdefault((self.plan, period), f"{bucket} of {self.plan}" if taken else bucket)

    # The life of a hold.

    @rule(
        rid=IDS,
        tokens=st.sampled_from([1, 5, 20, 30, 60]),
        step=st.sampled_from([5, 25, 60]),
        adapter=st.sampled_from(["pirate", "yaml"]),
        cap=CAPS,
    )
    def hold(self, rid: str, tokens: int, step: int, adapter: str, cap: int) -> None:
        asked, expected = self.asked(tokens, step, adapter, cap)
        asked = replace(asked, request_id=RequestId(rid))
        is_open = rid in self.model.holds
        reply, held = self.ask(self.ledger.hold(asked)), self.model.hold(rid, expected)
        if isinstance(held, Refusal) or isinstance(reply, Refusal):
            assert reply == held
            return
        drawn = [(draw.bucket, draw.amount) for draw in reply.draws]
        affords = min(tokens, held.affords) if held.unit == model.MONEY else tokens
        assert (drawn, reply.max_tokens) == (list(held.draws.items()), affords)
        if not is_open:
            self.sent[rid] = Sent(asked, reply, reply.held_nanos, replace(held, draws=dict(held.draws)))

    @rule(tokens=st.sampled_from([20, 30, 60]), step=st.sampled_from([5, 60]), cap=CAPS)
    def hold_new(self, tokens: int, step: int, cap: int) -> None:
        self.hold(f"req_new_{len(self.sent)}", tokens, step, "yaml", cap)

    @rule(rid=IDS, total=st.sampled_from([0, 10, 30, 60]), least=st.sampled_from([0, 10, 30]))
    def extend(self, rid: str, total: int, least: int) -> None:
        sent = self.sent.get(rid)
        asked = sent.asked if sent else request(rid)
        held = self.model.extend(rid, total, least)
        for _ in range(2):
            assert self.ask(self.ledger.extend(asked, Nanos(total), Nanos(least))) == held
        if sent and not isinstance(held, Refusal) and not sent.reply.covered_by_requests:
            sent.held = max(sent.held, held)

    @precondition(lambda self: self.model.holds)
    @rule(data=st.data(), total=st.sampled_from([20, 40, 60]), least=AMOUNTS)
    def extend_open(self, data: st.DataObject, total: int, least: int) -> None:
        self.extend(data.draw(st.sampled_from(sorted(self.model.holds))), total, min(least, total))

    @rule(rid=IDS, cost=AMOUNTS, calls=CALLS)
    def settle(self, rid: str, cost: int, calls: int) -> None:
        usage = Usage(completion_tokens=cost, requests=calls)
        settlement = Settlement(RequestId(rid), ACME, usage, Nanos(cost), Status.COMPLETE)
        self.deliver(settlement, self.sent.get(rid))

    @precondition(lambda self: self.unsettled)
    @rule(data=st.data(), cost=AMOUNTS, calls=CALLS)
    def settle_known(self, data: st.DataObject, cost: int, calls: int) -> None:
        self.settle(data.draw(st.sampled_from(self.unsettled)), cost, calls)

    @property
    def unsettled(self) -> list[str]:
        return sorted(self.sent.keys() - self.model.settled.keys())

    def deliver(self, settlement: Settlement, sent: Sent | None) -> None:
        """A settle, with what its gateway knows of the hold."""
        held = 0
        if sent is not None:
            snapshot = settlement.snapshot or snapshot_of(sent.reply, Nanos(sent.held))
            settlement, held = replace(settlement, snapshot=snapshot), snapshot.held
        used = Counter({model.MONEY: settlement.list_nanos, model.CALLS: settlement.usage.requests})
        expected = self.model.settle(settlement.request_id, used, held, sent.snapshot if sent else None)
        receipt = self.ask(self.ledger.settle(settlement))
        if isinstance(expected, Refusal) or isinstance(receipt, Refusal):
            assert receipt == expected
            return
        assert receipt.is_repeat == expected.is_repeat
        self.check_record(receipt.record, expected)
        self.acknowledged.append((True, partial(self.deliver, settlement, sent)))

    def check_record(self, record: UsageRecord, expected: Charge) -> None:
        drawn = [(draw.bucket, draw.amount) for draw in record.draws]
        assert (record.charged_nanos, drawn) == (expected.charged, list(expected.draws.items()))
        sales = {draw.bucket: (draw.price, draw.sold) for draw in record.draws if draw.price}
        assert sales == expected.sales
        assert record.list_nanos >= record.charged_nanos

    @rule(rid=IDS, cost=AMOUNTS, calls=CALLS)
    def checkpoint(self, rid: str, cost: int, calls: int) -> None:
        usage = Usage(completion_tokens=cost, requests=calls)
        held = self.sent[rid].held if rid in self.sent else 0
        progress = Progress(RequestId(rid), ACME, usage, Nanos(cost), Nanos(held))
        gone = self.run(self.ledger.checkpoint([progress]))
        assert gone == (frozenset() if rid in self.model.holds else {rid})
        self.model.checkpoint(rid, Counter({model.MONEY: cost, model.CALLS: calls}), held)

    @precondition(lambda self: self.model.holds)
    @rule(data=st.data(), cost=AMOUNTS, calls=CALLS)
    def checkpoint_open(self, data: st.DataObject, cost: int, calls: int) -> None:
        self.checkpoint(data.draw(st.sampled_from(sorted(self.model.holds))), cost, calls)

    @precondition(lambda self: self.model.holds)
    @rule(data=st.data())
    def expire(self, data: st.DataObject) -> None:
        rid = data.draw(st.sampled_from(sorted(self.model.holds)))
        self.ledger.renewed = tuple(self.model.holds.keys() - {rid})
        self.run(self.redis.zadd(SHARD.leases, {rid: 1}, xx=True))
        assert self.run(self.ledger.expire()) == 1
        expected = self.model.expire(rid)
        [(_, entry)] = self.run(self.redis.xrevrange(SHARD.stream, count=1))
        record = UsageRecord.from_json(entry["p"])
        assert record.record_id == f"rec_{rid}"
        self.check_record(record, expected)

    @rule()
    def damage(self) -> None:
        """Put a hold of another tenant first in line that cannot be ended: its bucket is gone."""
        draws = [["gone", "n", "5"]]
        hold = {"tenant": "zeta", "head": "", "draws": draws, "key": "", "usage": "0,0,0,0,0", "list": "0", "tpm": "0"}
        hold |= {"tokens": "0", "cap": "0", "allowance": "", "lease": "1", "since": "0", "asked": "", "affords": "0"}
        self.run(self.redis.hset(SHARD.holds, "damaged", json.dumps(hold)))
        self.run(self.redis.zadd(SHARD.leases, {"damaged": 0}))

    # Movements of credit.

    @rule(source=SOURCES, days=st.sampled_from([0, 15, 45]))
    def grant(self, source: str, days: int) -> None:
        number = int(source[-1])
        unit, amount = (Unit.REQUESTS, 3) if number % 3 == 2 else (Unit.NANOS, 20 * number + 5)
        scope = ("pirate",) if number == 5 else ()
        ends, price = self.clock.now_ms + days * DAY_MS if days else None, PRICES[number]
        self.fill(Grant(source, ACME, unit, amount, ends, scope, price))

    def fill(self, grant: Grant) -> None:
        bucket = Bucket(grant.unit, grant.amount, grant.expires_at_ms or FOREVER, grant.adapters, price=grant.price)
        assert self.run(self.ledger.grant(grant)) == self.model.fill(grant.source, bucket)
        self.acknowledged.append((False, partial(self.fill, grant)))

    @rule(unit=st.sampled_from(Unit), amount=st.sampled_from([-40, -2, 1, 30]))
    def adjust(self, unit: Unit, amount: int) -> None:
        source = f"adjustment:{unit}:{amount}"
        is_new = self.run(self.ledger.adjust(Adjustment(source, ACME, unit, amount, "miscounted")))
        assert is_new == self.model.fill(source, Bucket(unit, amount))
        self.acknowledged.append((False, partial(self.adjust, unit, amount)))

    @rule(dispute=st.integers(0, 1), granted_by=SOURCES, amount=st.sampled_from([10, 90]))
    def claw_back(self, dispute: int, granted_by: str, amount: int) -> None:
        source = f"dispute:{granted_by}:{dispute}:{amount}"
        taken = self.run(self.ledger.claw_back(Clawback(source, ACME, granted_by, amount)))
        assert taken == self.model.claw_back(source, granted_by, amount)
        self.acknowledged.append((False, partial(self.claw_back, dispute, granted_by, amount)))

    @precondition(lambda self: self.granted)
    @rule(data=st.data(), dispute=st.integers(0, 1), amount=st.sampled_from([10, 90]))
    def claw_back_known(self, data: st.DataObject, dispute: int, amount: int) -> None:
        self.claw_back(dispute, data.draw(st.sampled_from(self.granted)), amount)

    @property
    def granted(self) -> list[str]:
        return sorted(name for name in self.model.buckets if name.startswith("payment"))

    @rule(dispute=st.integers(0, 1), granted_by=SOURCES, amount=st.sampled_from([10, 90]))
    def restore(self, dispute: int, granted_by: str, amount: int) -> None:
        """A dispute that is won, as often as that is said."""
        source = f"dispute:{granted_by}:{dispute}:{amount}"
        given = self.ask(self.ledger.restore(Clawback(source, ACME, granted_by, amount)))
        assert given == self.model.restore(source)
        self.acknowledged.append((False, partial(self.restore, dispute, granted_by, amount)))

    @precondition(lambda self: self.model.clawbacks)
    @rule(data=st.data())
    def restore_known(self, data: st.DataObject) -> None:
        _, payment, number, dispute, amount = data.draw(st.sampled_from(sorted(self.model.clawbacks))).split(":")
        self.restore(int(dispute), f"{payment}:{number}", int(amount))

    @rule(number=st.integers(0, 1), nanos=st.sampled_from([5, 50]))
    def repay(self, number: int, nanos: int) -> None:
        source = f"invoice:{number}:{nanos}"
        assert self.run(self.ledger.repay_overage(source, ACME, nanos)) == self.model.repay(source, nanos)
        self.acknowledged.append((True, partial(self.repay, number, nanos)))

    # Time, and a store that fails.

    @rule(ms=st.sampled_from([1, 10 * DAY_MS, 31 * DAY_MS]))
    def time_passes(self, ms: int) -> None:
        self.clock.now_ms += ms
        self.model.now = self.clock.now_ms

    @rule(ms=st.sampled_from([10 * DAY_MS, 60 * DAY_MS]))
    def pause(self, ms: int) -> None:
        """Time passes, and the period of a subscription ends later by as much."""
        self.paused_ms += ms
        self.time_passes(ms)

    @rule()
    def replica_catches_up(self) -> None:
        self.run(self.replica.catch_up())
        self.replicated = deepcopy(self.model)
        self.acknowledged.clear()

    @rule(settles_first=st.booleans())
    def fail_over(self, settles_first: bool) -> None:
        """The store forgets what the replica did not have, and what was acknowledged since is sent again."""
        self.run(self.replica.take_over())
        self.model = deepcopy(self.replicated)
        self.model.now = self.clock.now_ms
        again, self.acknowledged = self.acknowledged, []
        self.entries = self.run(self.ledger.account(ACME)).seq
        for _, send in sorted(again, key=lambda one: one[0] != settles_first):
            send()

    @precondition(lambda self: self.model.holds)
    @rule(data=st.data(), total=st.sampled_from([40, 60]))
    def lose_extension(self, data: st.DataObject, total: int) -> None:
        self.replica_catches_up()
        self.extend_open(data, total, 0)
        self.fail_over(settles_first=False)

    @rule(tokens=st.sampled_from([20, 60]), cap=CAPS)
    def lose_hold(self, tokens: int, cap: int) -> None:
        self.replica_catches_up()
        self.hold_new(tokens, tokens, cap)
        self.fail_over(settles_first=False)

    @invariant()
    def account_agrees_with_model(self) -> None:
        account, expected = self.run(self.ledger.account(ACME)), self.model
        money = sum(hold.held for hold in expected.holds.values() if hold.unit == model.MONEY)
        calls = sum(hold.held for hold in expected.holds.values() if hold.unit == model.CALLS)
        assert (account.balance_nanos, account.overage_nanos) == (expected.balance, expected.exposure)
        assert (account.held_nanos, account.held_requests) == (money, calls)
        assert account.open_holds == len(expected.holds)
        assert [(b.id, b.remaining) for b in account.buckets if b.remaining] == expected.left(expected.in_force)
        asked, held = self.asked(1, 1, "pirate", 0)
        if held.allowance != expected.in_force:
            planned = self.run(self.ledger.account(ACME, asked.funding))
            assert [(b.id, b.remaining) for b in planned.buckets if b.remaining] == expected.left_for(held)
        if expected.window:
            counted = self.run(self.redis.hget(SHARD.account(ACME), "cap:key_1:day"))
            assert counted == f"{expected.window}|{expected.spent}|{expected.window_held}"
        if account.seq != self.entries:
            [(_, entry)] = self.run(self.redis.xrevrange(SHARD.stream, count=1))
            assert json.loads(entry["p"])["balance_nanos"] == expected.balance
            self.entries = account.seq

    def teardown(self) -> None:
        """The books are exact."""
        assert self.run(differences(self.redis, ACME)) == []


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
        with patch("billing.ledger.ledger.guarded", lambda *_: guarded(DEADLINE_S)):
            run_state_machine_as_test(machine, settings=limits)
    finally:
        machine.loop.run_until_complete(machine.redis.aclose())
        machine.loop.close()
