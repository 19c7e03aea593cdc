"""A gateway's own loops outlive a bug, and one that ends all the same is seen."""

import asyncio
from collections.abc import Mapping
from pathlib import Path

import pytest

from billing.ledger.account import Settlement
from billing.ledger.spool import Spool
from billing.money import parse_usd
from billing.usage import NOTHING, RequestId, Status, TenantId, Usage
from deployments.config import FareboxArgs
from deployments.gateway.ingress import GatewayIngress
from deployments.token_stream.gateway_end import SocketLink
from tests.deployments.gateway.api.test_completions import records
from tests.support.gateway import ADMIN_KEY, House, bearer, until
from tests.support.scripted import ScriptedLink


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.gateway.settlement.SPOOL_INTERVAL_S", 0.02)


async def test_deadlines_move_on_after_a_bug(house: House, link: ScriptedLink, monkeypatch: pytest.MonkeyPatch) -> None:
    extend, calls = link.extend, 0

    async def buggy(deadlines: Mapping[str, float]) -> frozenset[str]:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise RuntimeError("nobody foresaw this")
        return await extend(deadlines)

    monkeypatch.setattr(link, "extend", buggy)
    link.length, link.pause_s = 40, 0.01
    await house.chat(await house.tenant(), max_tokens=50)
    assert link.extended
    house.services.gateway.check()


async def test_the_spool_is_replayed_after_a_bug(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    replay, calls = Spool.replay, 0

    async def buggy(self: Spool, ledger: object) -> int:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise RuntimeError("nobody foresaw this")
        return await replay(self, ledger)  # type: ignore[arg-type]

    monkeypatch.setattr(Spool, "replay", buggy)
    await until(lambda: calls >= 3)
    house.services.gateway.check()


async def test_a_gateway_with_a_loop_that_ended_is_not_healthy(house: House) -> None:
    house.services.gateway.check()
    for loop in house.services.gateway._loops:
        loop.cancel()
        await asyncio.gather(loop, return_exceptions=True)
        with pytest.raises(AssertionError, match="loop"):
            house.services.gateway.check()


async def test_what_an_ended_gateway_left_is_settled_by_one_that_has_nothing_of_its_own(
    house: House, link: ScriptedLink, args: FareboxArgs
) -> None:
    key = await house.tenant(usd="1.00")
    link.pause_s = 30
    task = asyncio.create_task(house.chat(key))
    await until(lambda: bool(link.jobs))
    ended = Spool(Path(args.spool_dir))
    tenant, request_id = TenantId("acme"), RequestId(link.jobs[0].request_id)
    ended.append(Settlement(request_id, tenant, Usage(prompt_tokens=5), parse_usd("0.005"), Status.CANCELLED))
    ended.append(Settlement(RequestId("req_unknown"), tenant, NOTHING, parse_usd("0"), Status.FAILED))
    assert house.services.gateway.settler.spooled == 0
    ended.close()
    while not (found := await records(house)):  # noqa: ASYNC110, another loop makes it
        await asyncio.sleep(0.02)
    assert [record.request_id for record in found] == [request_id]
    await until(lambda: not house.services.gateway.settler.spooled)
    reply = await house.client.get("/admin/billing", headers=bearer(ADMIN_KEY))
    assert reply.json()["refused_settles"] == 1
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await house.settled()


class _Ended:
    """What an object becomes whose destructor was awaited: collecting it must not call it again."""


async def test_a_gateway_that_serve_ends_stops_leaves_the_board_and_lets_the_store_go(
    house: House, link: ScriptedLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert asyncio.iscoroutinefunction(GatewayIngress.__del__), "Serve's ingress wrapper awaits nothing else"
    forgotten: list[str] = []
    closed: list[bool] = []

    async def forget(_: object, gateway_id: str) -> None:
        forgotten.append(gateway_id)

    async def close() -> None:
        closed.append(True)

    monkeypatch.setattr("deployments.gateway.ingress.publication.forget_gateway", forget)
    ingress = GatewayIngress.__new__(GatewayIngress)
    ingress._services, ingress._is_open = house.services, True
    ingress._link = listening = SocketLink(None)  # type: ignore[arg-type]
    await listening.start("127.0.0.1")
    ingress._publishing = asyncio.create_task(asyncio.sleep(30))
    await ingress.check_health()
    with monkeypatch.context() as patched:
        patched.setattr(house.redis, "aclose", close)
        await ingress.__del__()
        await ingress.__del__()
    assert not listening._listener.is_listening
    assert (forgotten, closed, house.services.gateway._is_stopped) == (["gw_test"], [True], True)
    ingress.__class__ = _Ended  # type: ignore[assignment]
