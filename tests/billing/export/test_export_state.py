"""What the exporter says of itself: when it last succeeded, how old the oldest record is, whether it gets calls."""

import hashlib

from billing.dodo.call_budget import EXPORT_SHARE, SharedBudget
from billing.export.exporter import STARVED_MS, Exporter
from billing.export.outbox import ExporterState, Outbox
from billing.ledger.journal import CHAIN_DIGITS
from billing.notices.log import Notices
from billing.notices.notice import NoticeKind
from billing.store.keys import shard_for
from billing.usage import TenantId
from tests.support.world import MINUTE, SECOND, World


class Switched:
    """A budget that has calls or none."""

    def __init__(self, has_calls: bool = True) -> None:
        self.has_calls = has_calls

    async def take(self) -> bool:
        return self.has_calls


def exporter_with(world: World, budget: Switched) -> Exporter:
    return Exporter(world.redis, world.dodo, world.tenants, world.clock, budget, jitter=lambda: 0.0)


async def shown(world: World) -> ExporterState:
    return await Outbox(world.redis).shown()


async def test_success_is_a_flush_that_sent_something(world: World) -> None:
    await world.tenant("acme")
    exporter = world.exporter()
    await exporter.flush_once()
    assert (await shown(world)).last_success_ms == 0, "nothing was to be sent"
    await world.use("acme")
    await exporter.flush_once()
    sent_at = world.clock()
    assert (await shown(world)).last_success_ms == sent_at
    world.clock.move(MINUTE)
    await exporter.flush_once()
    state = await shown(world)
    assert (state.last_flush_ms, state.last_success_ms) == (sent_at + MINUTE, sent_at)


async def test_flush_that_leaves_a_shard_behind_is_no_success(world: World) -> None:
    for name in ("acme", "zeta"):
        await world.tenant(name)
    chain = hashlib.sha1(b"usage{}").hexdigest()[:CHAIN_DIGITS]
    await world.redis.xadd(shard_for(TenantId("acme")).stream, {"k": "usage", "t": "acme", "p": "{}", "c": chain})
    await world.use("zeta")
    assert (await world.exporter().flush_once()).sent == 1
    assert (await shown(world)).last_success_ms == 0


async def test_flush_without_calls_is_no_success(world: World) -> None:
    await world.tenant("acme")
    await world.use("acme")
    await exporter_with(world, Switched(False)).flush_once()
    state = await shown(world)
    assert (state.last_success_ms, state.starved_since_ms, state.waiting_events) == (0, world.clock(), 1)


async def test_export_without_calls_for_minutes_is_starved_and_noticed_once(world: World) -> None:
    await world.tenant("acme")
    await world.use("acme")
    budget, began = Switched(False), world.clock()
    exporter = exporter_with(world, budget)
    await exporter.flush_once()
    world.clock.move(STARVED_MS - 1)
    assert (await exporter.flush_once()).state == "running"
    assert await Notices(world.redis).newest() == []
    for _ in range(2):
        world.clock.move(1)
        report = await exporter.flush_once()
        assert (report.state, report.error) == (
            "starved",
            "no call to Dodo was left for 5 minutes: others use up what all share",
        )
    (notice,) = await Notices(world.redis).newest()
    assert (notice.kind, notice.facts["error"]) == (NoticeKind.EXPORT_STARVED, report.error)
    assert (await shown(world)).starved_since_ms == began
    budget.has_calls = True
    assert (await exporter.flush_once()).state == "running"
    state = await shown(world)
    assert (state.starved_since_ms, state.last_success_ms, state.error) == (0, world.clock(), "")


async def test_idle_export_is_never_starved(world: World) -> None:
    exporter = exporter_with(world, Switched(False))
    for _ in range(3):
        assert (await exporter.flush_once()).state == "running"
        world.clock.move(STARVED_MS)
    assert (await shown(world)).starved_since_ms == 0


async def test_page_calls_do_not_starve_the_export(world: World) -> None:
    await world.tenant("acme")
    await world.use("acme", overage=50)
    pages = SharedBudget(world.redis, 240)
    for _ in range(300):
        await pages.spend()
    budget = SharedBudget(world.redis, 240, EXPORT_SHARE)
    exporter = Exporter(world.redis, world.dodo, world.tenants, world.clock, budget)
    assert (await exporter.flush_once()).sent == 2


async def test_age_is_that_of_the_oldest_record_left(world: World) -> None:
    await world.tenant("acme")
    await world.use("acme", ago_ms=7 * MINUTE)
    await world.use("acme", ago_ms=2 * MINUTE)
    await world.fault("status:503")
    exporter = world.exporter()
    await exporter.flush_once()
    assert (await shown(world)).waiting_s(world.clock()) == 7 * 60, "of the first record in the event, not the last"
    await world.heal()
    world.clock.move(SECOND)
    await world.tenant("later", has_customer=False)
    await world.use("later", ago_ms=3 * SECOND)
    await exporter.flush_once(force=True)
    assert (await shown(world)).waiting_s(world.clock()) == 3, "what was sent in this flush is not left"


async def test_dead_letter_has_no_age(world: World) -> None:
    await world.tenant("acme")
    await world.tenants.set_customer(TenantId("acme"), "cus_unknown")
    await world.use("acme", ago_ms=MINUTE)
    await world.tenant("later", has_customer=False)
    await world.use("later", ago_ms=3 * SECOND)
    await world.exporter().flush_once()
    assert (await shown(world)).waiting_s(world.clock()) == 3
