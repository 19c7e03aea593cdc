"""A notice is recorded once and sent, signed, until the receiver acknowledges it."""

import asyncio
import json
from collections.abc import Callable

import httpx
import pytest
from redis.asyncio import Redis
from standardwebhooks import Webhook

from billing.notices.dispatcher import (
    ATTEMPTS,
    FIRST_RETRY_MS,
    MAX_RETRY_MS,
    NoticeDispatcher,
)
from billing.notices.log import Notices
from billing.notices.notice import Notice, NoticeKind
from billing.notices.receiver import NoticeReceiver, NoticeReceiverMisconfigured
from billing.store.keys import NOTICES
from billing.sweep import Sweep
from billing.usage import TenantId
from tests.support.clock import SteppedClock

SECRET = "whsec_" + "c2VjcmV0" * 4
RECEIVER = NoticeReceiver("http://127.0.0.1:9/notices", SECRET)


def notice(number: int) -> Notice:
    return Notice(
        NoticeKind.BALANCE_LOW, TenantId("acme"), f"balance:{number}", 1_000 + number, {"number": str(number)}
    )


class Ear:
    """A receiver that answers with these statuses, then 200, and remembers what it acknowledged."""

    def __init__(self, *statuses: int, refuses: str = "") -> None:
        self.statuses, self.refuses, self.numbers = list(statuses), refuses, list[str]()

    def __call__(self, request: httpx.Request) -> httpx.Response:
        Webhook(SECRET).verify(request.content, dict(request.headers))
        body = json.loads(request.content)
        assert (body["type"], body["data"]["tenant"]) == ("balance.low", "acme")
        number = body["data"]["number"]
        status = self.statuses.pop(0) if self.statuses else 200
        if number == self.refuses:
            status = 400
        if status < 300:
            self.numbers.append(number)
        return httpx.Response(status)


class Sender:
    """A dispatcher and its sweep, from run to run of one process."""

    def __init__(self, redis: Redis, ear: Callable[[httpx.Request], httpx.Response]) -> None:
        self.clock = SteppedClock(0)
        self.sweep = Sweep("notices", self.clock)
        self._notices = Notices(redis)
        self._dispatcher = NoticeDispatcher(RECEIVER, self.clock, httpx.MockTransport(ear))

    async def run(self, at_ms: int = 0) -> int:
        self.clock.now_ms = at_ms
        return await self._dispatcher.run_once(self._notices, self.sweep)


async def record(redis: Redis, *numbers: int) -> None:
    for number in numbers:
        await Notices(redis).record(notice(number))


async def test_same_notice_is_recorded_once(redis: Redis) -> None:
    notices = Notices(redis)
    recorded = await asyncio.gather(*(notices.record(notice(1)) for _ in range(5)))
    assert sorted(recorded) == [False, False, False, False, True]
    await record(redis, 2)
    assert [one.once for one in await notices.newest()] == ["balance:2", "balance:1"]
    assert [one.facts for one in await notices.newest(1)] == [{"number": "2"}]


async def test_notices_are_sent_in_order_and_once(redis: Redis) -> None:
    await record(redis, 0, 1, 2)
    sender = Sender(redis, ear := Ear())
    assert [await sender.run(), await sender.run()] == [3, 0]
    await record(redis, 3)
    assert await Sender(redis, ear).run() == 1
    assert ear.numbers == ["0", "1", "2", "3"]


async def test_receiver_that_fails_keeps_notices_waiting_in_order(redis: Redis) -> None:
    await record(redis, 0, 1)
    ear = Ear(500, 301)
    assert await Sender(redis, ear).run() == 0
    assert await Sender(redis, ear).run(FIRST_RETRY_MS - 1) == 0
    assert len(ear.statuses) == 1, "not due yet"
    assert await Sender(redis, ear).run(FIRST_RETRY_MS) == 0
    assert await Sender(redis, ear).run(FIRST_RETRY_MS + 2 * FIRST_RETRY_MS) == 2
    assert ear.numbers == ["0", "1"]


async def test_refused_notice_keeps_no_other_waiting(redis: Redis) -> None:
    await record(redis, 0, 1, 2)
    sender = Sender(redis, ear := Ear(refuses="1"))
    assert await sender.run() == 2
    await record(redis, 3)
    assert await sender.run() == 1
    assert ear.numbers == ["0", "2", "3"]
    ear.refuses = ""
    assert await sender.run(FIRST_RETRY_MS) == 1
    assert ear.numbers == ["0", "2", "3", "1"]
    assert await Sender(redis, ear).run() == 0, "the stored position is behind all of them"


async def test_refused_notice_is_passed_over_after_many_attempts(redis: Redis) -> None:
    await record(redis, 0, 1)
    sender = Sender(redis, ear := Ear(refuses="0"))
    for attempt in range(ATTEMPTS):
        await sender.run(attempt * MAX_RETRY_MS)
    assert (ear.numbers, sender.sweep.failing) == (["1"], ())
    ear.refuses = ""
    assert await Sender(redis, ear).run() == 0


async def test_notice_is_passed_over_after_a_day(redis: Redis) -> None:
    await record(redis, 1)
    ear, now = Ear(*[500] * (ATTEMPTS + 1)), 0
    for _ in range(ATTEMPTS):
        await Sender(redis, ear).run(now)
        now += MAX_RETRY_MS
    assert len(ear.statuses) == 1
    await record(redis, 2)
    ear.statuses.clear()
    assert await Sender(redis, ear).run(now) == 1
    assert ear.numbers == ["2"]
    assert len(await Notices(redis).newest()) == 2, "it stays in the log"


async def test_receiver_that_cannot_be_reached_is_tried_again(redis: Redis) -> None:
    def refuses(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused", request=request)

    await record(redis, 1)
    assert await Sender(redis, refuses).run() == 0
    assert (await Notices(redis).sent()).attempts == 1


async def test_notice_that_cannot_be_read_keeps_no_other_waiting(redis: Redis) -> None:
    await redis.xadd(NOTICES, {"n": notice(0).to_json().replace("balance.low", "of.another.version")})
    await record(redis, 1)
    assert await Sender(redis, ear := Ear()).run() == 1
    assert ear.numbers == ["1"]
    assert [one.facts["number"] for one in await Notices(redis).newest()] == ["1"]


@pytest.mark.parametrize(
    "environ",
    [
        {"FAREBOX_NOTICES_URL": "https://example.com"},
        {"FAREBOX_NOTICES_SECRET": SECRET},
        {"FAREBOX_NOTICES_URL": "ftp://example.com", "FAREBOX_NOTICES_SECRET": SECRET},
        {"FAREBOX_NOTICES_URL": "https://example.com", "FAREBOX_NOTICES_SECRET": "whsec_%%%"},
    ],
)
def test_half_a_receiver_is_refused(environ: dict[str, str]) -> None:
    with pytest.raises(NoticeReceiverMisconfigured, match="FAREBOX_NOTICES"):
        NoticeReceiver.from_env(environ)


def test_receiver_is_optional_and_its_secret_is_not_shown() -> None:
    assert NoticeReceiver.from_env({}) is None
    assert SECRET not in repr(RECEIVER)
