"""Dodo refuses the usage of some customers with a status that a wrong key has too: the others' is exported."""

import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace

import httpx
import pytest

from billing.dodo.client import Dodo
from billing.dodo.settings import DodoSettings
from billing.export.outbox import Outbox
from billing.notices.log import Notices
from billing.notices.notice import NoticeKind
from cluster.dodo_sandbox.server import SandboxServer
from tests.support.world import API_KEY, DAY, MINUTE, World, assert_same


@dataclass
class Refusing(httpx.AsyncBaseTransport):
    """A way to the sandbox that refuses calls which carry events of some customers."""

    inner: httpx.AsyncBaseTransport = field(default_factory=httpx.AsyncHTTPTransport)
    customers: dict[str, int] = field(default_factory=dict)
    """The status that each of them is refused with."""
    calls: int = 0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/events/ingest":
            self.calls += 1
            for event in json.loads(request.content)["events"]:
                if status := self.customers.get(event["customer_id"]):
                    told = {"code": "CUSTOMER_NOT_FOUND", "message": f"no customer {event['customer_id']}"}
                    return httpx.Response(status, json=told, request=request)
        return await self.inner.handle_async_request(request)

    async def aclose(self) -> None:
        await self.inner.aclose()


@pytest.fixture
async def way(world: World, sandbox: SandboxServer) -> AsyncIterator[Refusing]:
    """The world's way to Dodo."""
    way, usual = Refusing(), world.dodo
    world.dodo = Dodo(DodoSettings(API_KEY, base_url=sandbox.url), httpx.AsyncClient(transport=way))
    yield way
    await world.dodo.close()
    world.dodo = usual


async def using(world: World, count: int) -> list[str]:
    """So many tenants that used something; their customers."""
    customers = []
    for number in range(count):
        tenant = await world.tenant(f"tenant-{number}")
        await world.use(f"tenant-{number}")
        customers.append(tenant.dodo_customer_id)
    return customers


async def dead_tenants(world: World) -> Sequence[str]:
    return sorted(letter.tenant for letter in await Outbox(world.redis).dead())


@pytest.mark.parametrize("status", [401, 403, 404])
@pytest.mark.parametrize("place", [0, 4, 8])
async def test_refused_customer_keeps_no_other_from_being_exported(
    world: World, way: Refusing, status: int, place: int
) -> None:
    customers = await using(world, 9)
    way.customers = {customers[place]: status}
    report = await world.exporter().flush_once()
    assert (report.state, report.sent, report.dead_letters, report.waiting) == ("running", 8, 1, 0)
    (letter,) = await Outbox(world.redis).dead()
    assert letter.tenant == f"tenant-{place}"
    assert f"{status} CUSTOMER_NOT_FOUND: no customer {customers[place]}" in letter.reason
    (notice,) = await Notices(world.redis).newest()
    assert (notice.kind, notice.tenant) == (NoticeKind.EVENT_REFUSED, letter.tenant)
    assert f"farebox dodo revive {letter.id}" in notice.facts["remedy"]


async def test_many_refused_customers_keep_no_other_waiting_for_long(world: World, way: Refusing) -> None:
    customers = await using(world, 12)
    way.customers = dict.fromkeys(customers[:8], 404)
    exporter = world.exporter()
    for _ in range(4):
        await exporter.flush_once(force=True)
    assert await dead_tenants(world) == [f"tenant-{number}" for number in range(8)]
    assert (await Outbox(world.redis).sums()).acked_events == 4


async def test_usage_of_a_refused_customer_goes_to_the_dead_letters_without_a_stop(world: World, way: Refusing) -> None:
    customers = await using(world, 2)
    way.customers = {customers[0]: 404}
    exporter = world.exporter()
    await exporter.flush_once()
    await world.use("tenant-0")
    report = await exporter.flush_once()
    assert (report.state, report.dead_letters) == ("running", 1)
    assert len(await Notices(world.redis).newest()) == 1, "one a day"
    world.clock.move(DAY)
    await world.use("tenant-0")
    await exporter.flush_once()
    assert len(await Notices(world.redis).newest()) == 2


async def test_customer_that_is_there_again_has_everything_exported(world: World, way: Refusing) -> None:
    customers = await using(world, 3)
    way.customers = {customers[1]: 404}
    exporter = world.exporter()
    await exporter.flush_once()
    way.customers = {}
    for letter in await Outbox(world.redis).dead():
        assert await Outbox(world.redis).revive(replace(letter, reason=""))
    await exporter.flush_once()
    assert_same(await world.exported(), world.sums)


async def test_refusal_of_everything_stops_without_dead_letters_and_few_calls(world: World, way: Refusing) -> None:
    customers = await using(world, 20)
    way.customers = dict.fromkeys(customers, 404)
    exporter = world.exporter()
    for _ in range(10):
        assert (await exporter.flush_once(force=True)).state == "stopped"
        world.clock.move(MINUTE)
    assert await dead_tenants(world) == []
    assert way.calls <= 5 + 10 * 3, "halved once, then three single events a flush"
    way.customers = {}
    assert (await exporter.flush_once(force=True)).sent == 20
    assert_same(await world.exported(), world.sums)


async def test_only_customer_that_uses_something_is_no_dead_letter_before_dodo_takes_another(
    world: World, way: Refusing
) -> None:
    customers = await using(world, 1)
    way.customers = {customers[0]: 404}
    exporter = world.exporter()
    assert (await exporter.flush_once()).state == "stopped"
    assert await dead_tenants(world) == []
    await world.tenant("other")
    await world.use("other")
    report = await exporter.flush_once(force=True)
    assert (report.state, report.sent, report.dead_letters) == ("running", 1, 1)


async def test_refusal_that_passes_makes_no_dead_letter(world: World) -> None:
    await using(world, 1)
    await world.fault("status:404", times=1)
    exporter = world.exporter()
    assert (await exporter.flush_once()).state == "stopped"
    await world.use("tenant-0")
    assert (await exporter.flush_once(force=True)).sent == 2
    assert await dead_tenants(world) == []


async def test_lookup_that_is_refused_for_one_event_keeps_no_other_waiting(world: World) -> None:
    """An attempt of long ago is looked up first; that call may be refused as well."""
    await using(world, 3)
    await world.fault("drop_before", times=1)
    await world.exporter().flush_once()
    world.clock.move(2 * 60 * MINUTE)
    first = (await Outbox(world.redis).events())[0]
    await world.fault("status:403", path=f"/events/{first.id}")
    report = await world.exporter().flush_once(force=True)
    assert (report.sent, report.dead_letters) == (2, 1)
    assert await dead_tenants(world) == [first.tenant]


async def test_key_that_ends_in_mid_send_makes_no_dead_letters(world: World, way: Refusing) -> None:
    """What it took before shows nothing any more."""
    customers = await using(world, 9)
    exporter = world.exporter()
    assert (await exporter.flush_once()).sent == 9
    way.customers = dict.fromkeys(customers, 401)
    for number in range(9):
        await world.use(f"tenant-{number}")
    for _ in range(5):
        assert (await exporter.flush_once(force=True)).state == "stopped"
    assert await dead_tenants(world) == []
