"""When the use of a key is unusual: both sides of every rule, and what becomes of the key."""

from collections.abc import Mapping
from dataclasses import replace

import pytest
from redis.asyncio import Redis

from billing.abuse.addresses import AddressSketches, UsedKey
from billing.abuse.enforcer import LEFT_ALONE_MS, AbuseEnforcer
from billing.abuse.rules import HOUR_MS, Habits, Reason
from billing.catalog.abuse import Abuse
from billing.catalog.catalog import Catalog, Model
from billing.catalog.plans import Plan
from billing.ledger.admission import Admission
from billing.ledger.errors import RateLimited, SpendCapReached
from billing.ledger.ledger import Ledger
from billing.money import NANOS_PER_USD, Nanos
from billing.notices.log import Notices
from billing.notices.notice import NoticeKind
from billing.store.keys import api_key
from billing.sweep import Sweep
from billing.tenants.directory import Tenants
from billing.tenants.tenant import Principal, Tenant, new_key
from billing.usage import RequestId, Status, TenantId, Usage, UsageRecord
from tests.support.clock import SteppedClock
from tests.support.samples import ACME, PER_TOKEN, money, settlement

NOW = 1_000 * HOUR_MS
DAY_MS = 24 * HOUR_MS
KEY: UsedKey = (ACME, "key_1")
ABUSE = Abuse(long_hours=2, long_requests=10, long_tokens=100, addresses=5)


def record(hours_ago: int, usd: int = 0, tokens: int = 10, key_id: str = "key_1") -> UsageRecord:
    nanos = Nanos(usd * NANOS_PER_USD)
    return UsageRecord(
        record_id="rec",
        request_id=RequestId("req"),
        tenant=ACME,
        key_id=key_id,
        adapter="pirate",
        adapter_class="default",
        plan="prepaid",
        price_version="pv",
        usage=Usage(completion_tokens=tokens),
        status=Status.COMPLETE,
        occurred_at_ms=NOW - hours_ago * HOUR_MS,
        list_nanos=nanos,
        charged_nanos=nanos,
    )


def found(*records: UsageRecord, addresses: Mapping[UsedKey, int] | None = None, abuse: Abuse = ABUSE) -> list[Reason]:
    habits = Habits()
    for one in records:
        habits.note(one)
    return [verdict.reason for verdict in habits.verdicts(abuse, addresses or {}, NOW)]


USUAL = [record(hours_ago, usd=1) for hours_ago in (30, 20, 10)]
"""A dollar in each busy hour of more than a day."""


@pytest.mark.parametrize(
    ("before", "usd", "is_unusual"),
    [
        (USUAL, 20, False),  # twenty times the mean
        (USUAL, 21, True),
        (USUAL, 9, False),  # below what concerns anybody
        ([record(23, usd=1)], 1_000, False),  # a key of less than a day
        ([record(24, usd=1)], 1_000, True),
        ([record(168, usd=1)], 1_000, True),
        ([*USUAL, record(5, usd=17)], 100, False),  # it had a busy hour this week
        ([], 1_000, False),
    ],
)
def test_spend_is_judged_against_the_keys_busy_hours(before: list[UsageRecord], usd: int, is_unusual: bool) -> None:
    assert found(*before, record(0, usd=usd)) == ([Reason.SPEND] if is_unusual else [])


@pytest.mark.parametrize(
    ("an_hour_ago", "this_hour", "tokens", "is_scraping"),
    [
        ((10, 0), (10, 0), 100, True),
        ((10, 1), (10, 1), 100, True),  # 10 of 11 are as long as the longest
        ((10, 2), (10, 0), 100, False),
        ((10, 0), (9, 0), 100, False),  # too few
        ((0, 0), (10, 0), 100, False),  # not for hours
        ((10, 0), (10, 0), 99, False),  # short ones: a classifier's
    ],
)
def test_maximal_answers_for_hours_look_like_scraping(
    an_hour_ago: tuple[int, int], this_hour: tuple[int, int], tokens: int, is_scraping: bool
) -> None:
    records = [
        record(ago, tokens=length)
        for ago, (longest, shorter) in ((1, an_hour_ago), (0, this_hour))
        for length in [tokens] * longest + [tokens - 1] * shorter
    ]
    assert found(*records) == ([Reason.SCRAPING] if is_scraping else [])


@pytest.mark.parametrize(("count", "expected"), [(5, []), (6, [Reason.ADDRESSES])])
def test_key_used_from_many_addresses_is_unusual(count: int, expected: list[Reason]) -> None:
    assert found(record(0), addresses={KEY: count}) == expected


def test_idle_key_is_not_judged_and_a_week_is_remembered() -> None:
    assert found(*USUAL, record(1, usd=1_000)) == []
    habits = Habits()
    habits.note(record(169))
    habits.note(record(168, key_id="key_2"))
    habits.forget(NOW)
    assert habits.used_in(NOW - 169 * HOUR_MS) == []
    assert habits.used_in(NOW - 168 * HOUR_MS) == [(ACME, "key_2")]


@pytest.fixture
async def tenants(store: Redis, clock: SteppedClock) -> Tenants:
    clock.now_ms = NOW
    tenants = Tenants(store, clock)
    await tenants.create(Tenant(id=ACME, email="ops@acme.test", plan="prepaid"))
    await tenants.add_key(new_key(ACME, 0, "ci")[1].model_copy(update={"id": "key_1"}))
    return tenants


def enforcer(tenants: Tenants, store: Redis, clock: SteppedClock, *records: UsageRecord) -> AbuseEnforcer:
    habits = Habits()
    for one in records:
        habits.note(one)
    return AbuseEnforcer(tenants, Notices(store), AddressSketches(store, clock), habits, clock)


async def test_key_is_throttled_and_noticed_once(tenants: Tenants, store: Redis, clock: SteppedClock) -> None:
    guard = enforcer(tenants, store, clock, *USUAL, record(0, usd=500))
    assert [await guard.run_once(ABUSE, Sweep("abuse")), await guard.run_once(ABUSE, Sweep("abuse"))] == [1, 0]
    [notice] = await Notices(store).newest()
    assert (notice.kind, notice.facts["reason"], notice.facts["name"]) == (
        NoticeKind.KEY_THROTTLED,
        "unusual_spend",
        "ci",
    )
    assert "$500.00 this hour" in notice.facts["detail"]
    assert "farebox keys lift acme key_1" in notice.facts["remedy"]
    why = (await tenants.key(ACME, "key_1")).throttled
    assert why is not None
    assert (why.reason, why.since_ms) == ("unusual_spend", NOW)


async def test_lifted_key_is_left_alone_for_a_day(tenants: Tenants, store: Redis, clock: SteppedClock) -> None:
    await enforcer(tenants, store, clock, *USUAL, record(0, usd=500)).run_once(ABUSE, Sweep("abuse"))
    assert (await tenants.lift_key(ACME, "key_1")).throttled is None
    for later, is_put_back in ((LEFT_ALONE_MS - 1, False), (LEFT_ALONE_MS, True)):
        clock.now_ms = NOW + later
        again = replace(record(0, usd=500), occurred_at_ms=clock.now_ms)
        await enforcer(tenants, store, clock, *USUAL, again).run_once(ABUSE, Sweep("abuse"))
        assert ((await tenants.key(ACME, "key_1")).throttled is not None) == is_put_back


async def test_abuse_detection_can_be_switched_off(tenants: Tenants, store: Redis, clock: SteppedClock) -> None:
    guard = enforcer(tenants, store, clock, *USUAL, record(0, usd=500), record(0, usd=500, key_id="key_gone"))
    assert await guard.run_once(ABUSE.model_copy(update={"watch": False}), Sweep("abuse")) == 0
    assert (await tenants.key(ACME, "key_1")).throttled is None
    assert await guard.run_once(ABUSE, Sweep("abuse")) == 1, "and an unknown key is skipped"


async def test_key_is_throttled_though_another_cannot_be_read(
    tenants: Tenants, store: Redis, clock: SteppedClock
) -> None:
    bad = TenantId("aaa")
    await tenants.create(Tenant(id=bad, email="ops@aaa.test", plan="prepaid"))
    key = new_key(bad, 0)[1]
    await tenants.add_key(key)
    await store.set(api_key(key.hash), "{}")
    sweep = Sweep("abuse", clock)
    records = [replace(one, tenant=bad, key_id=key.id) for one in (*USUAL, record(0, usd=500))]
    guard = enforcer(tenants, store, clock, *records, *USUAL, record(0, usd=500))
    assert await guard.run_once(ABUSE, sweep) == 1
    assert (await tenants.key(ACME, "key_1")).throttled is not None
    assert [one.id for one in sweep.failing] == [f"aaa/{key.id}"]


async def test_addresses_are_estimated_and_not_stored(tenants: Tenants, store: Redis, clock: SteppedClock) -> None:
    gateways = [AddressSketches(store, clock) for _ in range(2)]
    for number in range(8):
        for gateway in gateways:
            gateway.note(ACME, "key_1", f"192.0.2.{number}")
    for gateway in gateways:
        await gateway.flush()
        await gateway.flush()
    other = (ACME, "key_2")
    assert await gateways[0].counts({KEY: [KEY], other: [other]}) == {KEY: 8, other: 0}
    assert not [name async for name in store.scan_iter("*192.0.2*")]
    assert await enforcer(tenants, store, clock, record(0)).run_once(ABUSE, Sweep("abuse")) == 1
    clock.now_ms += HOUR_MS
    assert await gateways[0].counts({KEY: [KEY]}) == {KEY: 0}


async def test_rotated_key_is_judged_by_the_past_of_the_one_it_replaced(
    tenants: Tenants, store: Redis, clock: SteppedClock
) -> None:
    _, second = await tenants.rotate_key(ACME, "key_1", grace_ms=0)
    _, third = await tenants.rotate_key(ACME, second.id, grace_ms=HOUR_MS)
    past = [*USUAL[:2], record(10, usd=1, key_id=second.id)]
    guard = enforcer(tenants, store, clock, *past, record(0, usd=21, key_id=third.id))
    assert await guard.run_once(ABUSE, Sweep("abuse")) == 1
    assert (await tenants.key(ACME, third.id)).throttled is not None
    assert (await tenants.key(ACME, "key_1")).throttled is None, "it is used no more"


async def test_rotation_wipes_out_no_busy_hour(tenants: Tenants, store: Redis, clock: SteppedClock) -> None:
    """Two keys share the spend of an hour while the old one has its grace."""
    _, fresh = await tenants.rotate_key(ACME, "key_1", grace_ms=DAY_MS)
    half = [record(0, usd=11), record(0, usd=11, key_id=fresh.id)]
    assert await enforcer(tenants, store, clock, *USUAL, *half).run_once(ABUSE, Sweep("abuse")) == 2
    busy = [*USUAL, record(5, usd=17)]
    lifted = [await tenants.lift_key(ACME, id_) for id_ in ("key_1", fresh.id)]
    clock.now_ms += LEFT_ALONE_MS
    later = replace(record(0, usd=100, key_id=fresh.id), occurred_at_ms=clock.now_ms)
    assert await enforcer(tenants, store, clock, *busy, later).run_once(ABUSE, Sweep("abuse")) == 0
    assert [key.throttled for key in lifted] == [None, None]


async def test_addresses_of_rotated_keys_count_together(tenants: Tenants, store: Redis, clock: SteppedClock) -> None:
    _, fresh = await tenants.rotate_key(ACME, "key_1", grace_ms=DAY_MS)
    sketches = AddressSketches(store, clock)
    for number in range(4):
        sketches.note(ACME, "key_1", f"192.0.2.{number}")
        sketches.note(ACME, fresh.id, f"192.0.2.{number + 2}")
    await sketches.flush()
    guard = enforcer(tenants, store, clock, record(0), record(0, key_id=fresh.id))
    assert await guard.run_once(ABUSE, Sweep("abuse")) == 2
    assert "about 6 client addresses" in (await Notices(store).newest())[0].facts["detail"]


PIRATE = Model(id="pirate", price=PER_TOKEN)
CATALOG = Catalog(models=(PIRATE,), plans={"prepaid": Plan(kind="prepaid")}, default_plan="prepaid")


async def test_throttled_key_is_limited_and_others_are_not(
    ledger: Ledger, tenants: Tenants, store: Redis, clock: SteppedClock
) -> None:
    await ledger.grant(money(10_000_000))
    await enforcer(tenants, store, clock, *USUAL, record(0, usd=500)).run_once(ABUSE, Sweep("abuse"))
    key, tenant = await tenants.key(ACME, "key_1"), await tenants.get(TenantId("acme"))
    little = CATALOG.model_copy(update={"abuse": Abuse(hourly_cap="0.00002", requests_per_minute=2)})
    gate = Admission(ledger, clock)

    async def admit(request_id: str, who: Principal) -> None:
        await gate.admit(who, PIRATE, little, RequestId(request_id), 10, 5)

    held = Principal(key, tenant)
    await admit("req_1", held)
    await ledger.settle(settlement("req_1", completion=5))
    with pytest.raises(SpendCapReached, match="throttled"):
        await admit("req_2", held)
    await admit("req_3", Principal(new_key(ACME, 0)[1], tenant))
    clock.now_ms += HOUR_MS
    await admit("req_4", held)
    with pytest.raises(RateLimited) as refused:
        await admit("req_5", held)
    assert refused.value.limit == 2
