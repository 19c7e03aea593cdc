"""The background tasks of a gateway, and its end under Serve."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

import pytest
from redis.asyncio import Redis

from billing.catalog import publication
from billing.ledger.account import Settlement
from billing.ledger.spool import Spool
from billing.money import parse_usd
from billing.usage import NOTHING, RequestId, Status, TenantId, Usage
from deployments.config import FareboxArgs
from deployments.gateway.ingress import GatewayIngress
from tests.support.gateway import ADMIN_KEY, USER_CONFIG, Harness, bearer
from tests.support.scripted import ScriptedLink
from tests.support.waiting import until


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.gateway.settlement.SPOOL_INTERVAL_S", 0.02)


async def test_deadlines_extended_after_bug(
    harness: Harness, link: ScriptedLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    extend, calls = link.extend, 0

    async def buggy(deadlines: Mapping[str, float]) -> frozenset[str]:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise RuntimeError("a bug")
        return await extend(deadlines)

    monkeypatch.setattr(link, "extend", buggy)
    link.length, link.pause_s = 40, 0.01
    await harness.chat(await harness.tenant(), max_tokens=50)
    assert link.extended
    harness.gateway.check()


async def test_spool_replayed_after_bug(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    replay, calls = Spool.replay, 0

    async def buggy(self: Spool, ledger: object) -> int:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise RuntimeError("a bug")
        return await replay(self, ledger)  # type: ignore[arg-type]

    monkeypatch.setattr(Spool, "replay", buggy)
    await until(lambda: calls >= 3)
    harness.gateway.check()


async def test_gateway_unhealthy_when_task_ended(harness: Harness) -> None:
    harness.gateway.check()
    for loop in harness.gateway.tasks:
        loop.cancel()
        await asyncio.gather(loop, return_exceptions=True)
        with pytest.raises(AssertionError, match="task"):
            harness.gateway.check()


async def test_spool_of_ended_gateway_is_replayed(harness: Harness, link: ScriptedLink, args: FareboxArgs) -> None:
    key = await harness.tenant(usd="1.00")
    link.pause_s = 30
    task = asyncio.create_task(harness.chat(key))
    await until(lambda: bool(link.requests))
    ended = Spool(Path(args.spool_dir))
    tenant, request_id = TenantId("acme"), RequestId(link.requests[0].request_id)
    ended.append(Settlement(request_id, tenant, Usage(prompt_tokens=5), parse_usd("0.005"), Status.CANCELLED))
    ended.append(Settlement(RequestId("req_unknown"), tenant, NOTHING, parse_usd("0"), Status.FAILED))
    assert harness.gateway.parts.settler.spooled == 0
    ended.close()
    while not (found := await harness.records()):  # noqa: ASYNC110, another loop makes it
        await asyncio.sleep(0.02)
    assert [record.request_id for record in found] == [request_id]
    await until(lambda: not harness.gateway.parts.settler.spooled)
    reply = await harness.client.get("/admin/billing", headers=bearer(ADMIN_KEY))
    assert reply.json()["refused_settles"] == 1
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await harness.settled()


class _Ended:
    """Without a destructor: garbage collection must not call again the one that was awaited."""


async def test_ingress_closed_by_serve_stops_gateway(
    args: FareboxArgs, base_path: Path, redis: Redis, store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert asyncio.iscoroutinefunction(GatewayIngress.__del__), "Serve's ingress wrapper awaits nothing else"
    monkeypatch.setenv("REDIS_URL", store_url)
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "127.0.0.1")
    model = args.model.model_copy(update={"path": str(base_path)})
    ingress = GatewayIngress.__new__(GatewayIngress)
    begin: Callable[..., Awaitable[None]] = ingress.__init__  # type: ignore[misc, assignment]
    await begin(args.model_copy(update={"model": model}), None)
    await ingress.reconfigure(USER_CONFIG)
    while not await publication.gateways(redis):  # noqa: ASYNC110, another task publishes
        await asyncio.sleep(0.01)
    await ingress.check_health()
    await ingress.__del__()
    assert await publication.gateways(redis) == []
    await ingress.__del__()
    ingress.__class__ = _Ended  # type: ignore[assignment]
