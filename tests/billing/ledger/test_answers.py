"""An idempotency key stands for one answer and one charge, wherever its gateway dies."""

import asyncio

import pytest
from redis.asyncio import Redis

from billing.ledger.account import Progress
from billing.ledger.answers import KEPT_MS, MAX_ANSWER_BYTES, Answers, Asked, Kept
from billing.ledger.errors import AnswerIncomplete, AnswerTooLarge, IdempotencyKeyInUse, IdempotencyKeyReused
from billing.ledger.ledger import Ledger
from billing.money import Nanos
from billing.store.keys import shard_for
from billing.usage import NOTHING, RequestId, Status, TenantId
from tests.support.clock import SteppedClock
from tests.support.samples import ACME, money, records, request, settlement

LEASE_MS = 30_000
CHARGE = 20_000


def asked(request_id: str = "req_1", body: str = "b", stream: bool = False, tenant: str = "acme") -> Asked:
    return Asked(TenantId(tenant), "key-1", RequestId(request_id), body, stream)


@pytest.fixture
def answers(store: Redis) -> Answers:
    return Answers(store, LEASE_MS)


async def lease_over(store: Redis, request_id: str = "req_1") -> None:
    """As if the lease of a claim and its hold had passed."""
    name, _ = await entry(store)
    await store.hincrby(name, "at", -LEASE_MS)
    await store.zadd(shard_for(ACME).leases, {request_id: 1}, xx=True)


async def entry(store: Redis) -> tuple[str, dict[str, str]]:
    [name] = [name async for name in store.scan_iter("*:answer:*")]
    return name, await store.hgetall(name)


class TestAnAnswer:
    async def test_is_repeated_with_its_record_and_kept_for_a_day(
        self, answers: Answers, ledger: Ledger, store: Redis
    ) -> None:
        await ledger.grant(money(100_000))
        assert await answers.claim(asked()) is None
        await ledger.hold(request())
        await answers.stage(asked(), "the answer")
        receipt = await ledger.settle(settlement())
        await answers.conclude(asked())
        assert await answers.claim(asked("req_2")) == Kept("the answer", receipt.record)
        name, _ = await entry(store)
        assert KEPT_MS - 10_000 < await store.pttl(name) <= KEPT_MS

    async def test_outlives_the_ledgers_memory_of_its_request(
        self, answers: Answers, ledger: Ledger, store: Redis
    ) -> None:
        await ledger.grant(money(100_000))
        await answers.claim(asked())
        await ledger.hold(request())
        await answers.stage(asked(), "the answer")
        await ledger.settle(settlement())
        await answers.conclude(asked())
        await store.delete(*shard_for(ACME).settled)
        await store.delete(shard_for(ACME).stream)
        kept = await answers.claim(asked("req_2"))
        assert kept is not None
        assert kept.record.charged_nanos == CHARGE

    @pytest.mark.parametrize(("size", "is_kept"), [(MAX_ANSWER_BYTES, True), (MAX_ANSWER_BYTES + 1, False)])
    async def test_answer_beyond_the_limit_is_refused_with_its_record(
        self, answers: Answers, ledger: Ledger, store: Redis, size: int, is_kept: bool
    ) -> None:
        await ledger.grant(money(100_000))
        await answers.claim(asked())
        await ledger.hold(request())
        await answers.stage(asked(), "ä" + "x" * (size - 2))
        await ledger.settle(settlement())
        await answers.conclude(asked())
        if is_kept:
            assert await answers.claim(asked("req_2"))
        else:
            with pytest.raises(AnswerTooLarge, match="rec_req_1"):
                await answers.claim(asked("req_2"))
            name, _ = await entry(store)
            assert await store.memory_usage(name) < 4096

    async def test_belongs_to_its_tenant_and_its_body(self, answers: Answers) -> None:
        assert await answers.claim(asked()) is None
        assert await answers.claim(asked("req_2", tenant="other")) is None
        with pytest.raises(IdempotencyKeyReused):
            await answers.claim(asked("req_3", body="another"))


class TestAClaim:
    async def test_is_taken_by_one_of_many(self, answers: Answers) -> None:
        tries = [answers.claim(asked(f"req_{number}")) for number in range(50)]
        outcomes = await asyncio.gather(*tries, return_exceptions=True)
        assert outcomes.count(None) == 1
        assert sum(isinstance(outcome, IdempotencyKeyInUse) for outcome in outcomes) == 49

    async def test_sent_twice_after_a_lost_reply_is_one_claim(self, answers: Answers) -> None:
        assert await answers.claim(asked()) is None
        assert await answers.claim(asked()) is None
        await answers.check(asked())

    async def test_whose_request_charged_nothing_is_free_again(
        self, answers: Answers, ledger: Ledger, store: Redis
    ) -> None:
        await ledger.grant(money(100_000))
        await answers.claim(asked())
        await answers.conclude(asked())  # refused before its hold
        assert await answers.claim(asked("req_2")) is None
        await ledger.hold(request("req_2"))
        await ledger.void(RequestId("req_2"), ACME)
        await answers.conclude(asked("req_2"))
        assert await answers.claim(asked("req_3")) is None

    async def test_is_concluded_by_its_own_request_only(self, answers: Answers) -> None:
        await answers.claim(asked())
        await answers.conclude(asked("req_2"))
        with pytest.raises(IdempotencyKeyInUse):
            await answers.claim(asked("req_2"))

    async def test_stands_as_long_as_its_hold(self, answers: Answers, ledger: Ledger, store: Redis) -> None:
        await ledger.grant(money(100_000))
        await answers.claim(asked())
        await ledger.hold(request())
        await lease_over(store)
        await answers.conclude(asked())
        with pytest.raises(IdempotencyKeyInUse):
            await answers.claim(asked("req_2"))

    async def test_that_was_taken_over_may_neither_deliver_nor_stage(self, answers: Answers, store: Redis) -> None:
        await answers.claim(asked())
        await lease_over(store)
        assert await answers.claim(asked("req_2")) is None
        with pytest.raises(IdempotencyKeyInUse):
            await answers.check(asked())
        with pytest.raises(IdempotencyKeyInUse):
            await answers.stage(asked(), "too late")
        await answers.conclude(asked())
        await answers.stage(asked("req_2"), "in time")


STEPS = ("claim", "hold", "deliver", "stage", "settle", "conclude")


class Course:
    """A keyed request whose gateway dies after one of its steps."""

    def __init__(self, answers: Answers, ledger: Ledger) -> None:
        self.answers, self.ledger = answers, ledger

    async def run(self, request_id: str, until: str, stream: bool) -> Kept | None:
        ours = asked(request_id, stream=stream)
        if (kept := await self.answers.claim(ours)) is not None:
            return kept
        for step in STEPS[: STEPS.index(until) + 1]:
            await self._take(step, ours)
        return None

    async def _take(self, step: str, ours: Asked) -> None:
        whole = settlement(ours.request_id)
        if step == "hold":
            await self.ledger.hold(request(ours.request_id, lease_ms=LEASE_MS))
        if step == "deliver":  # an answer on its way is no progress: its gateway's death makes it free
            usage, nanos = (whole.usage, whole.list_nanos) if ours.is_streamed else (NOTHING, Nanos(0))
            await self.ledger.checkpoint([Progress(ours.request_id, ACME, usage, nanos)])
        if step == "stage":
            await self.answers.stage(ours, f"answer of {ours.request_id}")
        if step == "settle":
            await self.ledger.settle(whole)
        if step == "conclude":
            await self.answers.conclude(ours)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("step", STEPS)
async def test_wherever_a_gateway_dies_a_retry_leads_to_one_charge(
    answers: Answers, ledger: Ledger, store: Redis, step: str, stream: bool
) -> None:
    await ledger.grant(money(1_000_000))
    course = Course(answers, ledger)
    await course.run("req_1", step, stream)
    is_settled = step in ("settle", "conclude")
    if not is_settled:
        with pytest.raises(IdempotencyKeyInUse):
            await course.run("req_2", "conclude", stream)
        await lease_over(store)
        await ledger.expire()
    is_partial = stream and step == "deliver"
    if is_partial:
        with pytest.raises(AnswerIncomplete, match="rec_req_1"):
            await course.run("req_2", "conclude", stream)
    else:
        kept = await course.run("req_2", "conclude", stream)
        is_repeat = is_settled or (stream and step == "stage")
        assert (kept is not None) is is_repeat
        again = await course.run("req_3", "conclude", stream)
        assert again is not None
        assert again.answer == ("answer of req_1" if is_repeat else "answer of req_2")
    assert [record.charged_nanos for record in await records(store) if record.charged_nanos] == [CHARGE]
    assert (await ledger.account(ACME)).balance_nanos == 1_000_000 - CHARGE


async def test_a_gateway_that_was_held_up_cannot_charge_what_another_ran_in_its_place(
    answers: Answers, ledger: Ledger, store: Redis
) -> None:
    await ledger.grant(money(1_000_000))
    course = Course(answers, ledger)
    await course.run("req_1", "stage", stream=False)
    await lease_over(store)
    await ledger.expire()
    assert await course.run("req_2", "conclude", stream=False) is None
    late = await ledger.settle(settlement("req_1"))
    assert (late.is_repeat, late.record.status, late.record.charged_nanos) == (True, Status.EXPIRED, 0)
    assert [record.charged_nanos for record in await records(store)] == [0, CHARGE]


@pytest.mark.parametrize(
    ("stream", "staged", "is_free"), [(False, False, True), (False, True, False), (True, False, False)]
)
async def test_what_may_have_been_charged_longer_ago_than_is_remembered_is_not_run_again(
    store: Redis, clock: SteppedClock, stream: bool, staged: bool, is_free: bool
) -> None:
    answers = Answers(store, LEASE_MS, marker_window_ms=LEASE_MS // 2)
    await answers.claim(asked(stream=stream))
    if staged:
        await answers.stage(asked(stream=stream), "the answer")
    await lease_over(store)
    if is_free:
        assert await answers.claim(asked("req_2", stream=stream)) is None
    else:
        with pytest.raises(AnswerIncomplete):
            await answers.claim(asked("req_2", stream=stream))
