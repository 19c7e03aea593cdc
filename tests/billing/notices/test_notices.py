"""A notice is told once, kept in order, and sent signed until it is heard; nothing is told twice."""

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
from billing.sweep import Sweep
from billing.usage import TenantId

SECRET = "whsec_" + "c2VjcmV0" * 4
RECEIVER = NoticeReceiver("http://127.0.0.1:9/notices", SECRET)


def notice(number: int) -> Notice:
    return Notice(
        NoticeKind.BALANCE_LOW, TenantId("acme"), f"balance:{number}", 1_000 + number, {"number": str(number)}
    )


class Ear:
    """A receiver that answers as it is told and remembers what it verified."""

    def __init__(self, *statuses: int) -> None:
        self.statuses, self.heard = list(statuses), []  # type: list[int], list[tuple[str, str]]

    def __call__(self, request: httpx.Request) -> httpx.Response:
        Webhook(SECRET).verify(request.content, dict(request.headers))
        status = self.statuses.pop(0) if self.statuses else 200
        body = json.loads(request.content)
        assert (body["type"], body["data"]["tenant"]) == ("balance.low", "acme")
        if status < 300:
            self.heard.append((request.headers["webhook-id"], body["data"]["number"]))
        return httpx.Response(status)


async def send(redis: Redis, ear: Callable[[httpx.Request], httpx.Response], now_ms: int = 0) -> int:
    dispatcher = NoticeDispatcher(RECEIVER, lambda: now_ms, httpx.MockTransport(ear))
    return await dispatcher.run_once(Notices(redis), Sweep("notices", lambda: now_ms))


async def test_the_same_is_told_once(redis: Redis) -> None:
    notices = Notices(redis)
    told = await asyncio.gather(*(notices.record(notice(1)) for _ in range(5)))
    assert sorted(told) == [False, False, False, False, True]
    await notices.record(notice(2))
    assert [one.once for one in await notices.newest()] == ["balance:2", "balance:1"]
    assert [one.facts for one in await notices.newest(1)] == [{"number": "2"}]


async def test_notices_are_sent_in_order_and_once(redis: Redis) -> None:
    for number in range(3):
        await Notices(redis).record(notice(number))
    ear = Ear()
    assert [await send(redis, ear), await send(redis, ear)] == [3, 0]
    assert [number for _, number in ear.heard] == ["0", "1", "2"]
    await Notices(redis).record(notice(3))
    assert await send(redis, ear) == 1


async def test_one_that_is_not_heard_keeps_its_id_and_its_place(redis: Redis) -> None:
    for number in range(2):
        await Notices(redis).record(notice(number))
    ear = Ear(500, 301)
    assert await send(redis, ear) == 0
    assert await send(redis, ear, FIRST_RETRY_MS - 1) == 0
    assert len(ear.statuses) == 1, "not due yet"
    assert await send(redis, ear, FIRST_RETRY_MS) == 0
    assert await send(redis, ear, FIRST_RETRY_MS + 2 * FIRST_RETRY_MS) == 2
    assert [number for _, number in ear.heard] == ["0", "1"]


async def test_a_deaf_receiver_is_tried_for_a_day_and_then_the_notice_is_passed_over(redis: Redis) -> None:
    await Notices(redis).record(notice(1))
    ear, now = Ear(*[500] * (ATTEMPTS + 1)), 0
    for _ in range(ATTEMPTS):
        await send(redis, ear, now)
        now += MAX_RETRY_MS
    assert len(ear.statuses) == 1
    await Notices(redis).record(notice(2))
    ear.statuses.clear()
    assert await send(redis, ear, now) == 1
    assert [number for _, number in ear.heard] == ["2"]
    assert len(await Notices(redis).newest()) == 2, "it stays in the log"


async def test_a_receiver_that_cannot_be_reached_is_tried_again(redis: Redis) -> None:
    def refuses(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused", request=request)

    await Notices(redis).record(notice(1))
    assert await send(redis, refuses) == 0
    assert (await Notices(redis).sent()).attempts == 1


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


def test_a_receiver_is_optional_and_its_secret_is_not_shown() -> None:
    assert NoticeReceiver.from_env({}) is None
    assert SECRET not in repr(RECEIVER)
