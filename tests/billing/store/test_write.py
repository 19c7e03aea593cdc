"""A process that still runs once the store was migrated writes nothing to it, whatever it writes."""

import json
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from redis.asyncio import Redis

from billing.abuse.addresses import AddressSketches
from billing.archive.archive_cursor import ArchiveCursor
from billing.catalog import publication
from billing.catalog.catalog import Catalog
from billing.commerce.auto_refill.refill import Refill
from billing.commerce.auto_refill.store import Refills
from billing.commerce.dodo_ids import keep_ids
from billing.commerce.inbox import Delivery, Inbox, Outcome, PurchasedCredit
from billing.export.outbox import ExporterState, Outbox
from billing.ledger.codec import pack_settlement
from billing.ledger.ledger import Ledger
from billing.notices.log import Notices, Sent
from billing.reconcile import proof_state, watermark
from billing.reconcile.proof_state import ProofState
from billing.reconcile.watermark import Mark, Watermarks
from billing.store.connection import reach, verify
from billing.store.errors import StoreUnavailable
from billing.store.keys import META, SCHEMA, shard_for
from billing.store.schema import FENCES
from billing.tenants.directory import Tenants
from billing.tenants.tenant import Tenant, new_key
from billing.usage import RequestId, TenantId, Unit
from cluster import valkey
from tests.support import recorded
from tests.support.samples import ACME, settlement
from tests.support.world import CATALOG

ZETA = TenantId("zeta")
PUBLISHED = Catalog.model_validate(CATALOG)
REFILL = Refill(pack="small", threshold_nanos=1, monthly_cap_cents=1_500)
OLD = Delivery("wh_0", "x", "", 1, Outcome.KEPT)
BOUGHT = PurchasedCredit("payment:pay_1:pdt_1", Unit.NANOS, 1, None, ())
STORED, NEW = Delivery("wh_1", "x", "{}", 1), Delivery("wh_2", "x", "{}", 1)


def tenant(id_: TenantId, customer: str = "") -> Tenant:
    return Tenant(id=id_, email="a@example.com", plan="prepaid", dodo_customer_id=customer)


async def flush_an_address(redis: Redis) -> None:
    sketches = AddressSketches(redis)
    sketches.note(ACME, "key_1", "192.0.2.1")
    await sketches.flush()


WRITES: dict[str, Callable[[Redis], Awaitable[object]]] = {
    "tenant": lambda redis: Tenants(redis).create(tenant(ZETA)),
    "tenant with a customer": lambda redis: Tenants(redis).create(tenant(ZETA, "cus_1")),
    "customer": lambda redis: Tenants(redis).set_customer(ACME, "cus_2"),
    "key": lambda redis: Tenants(redis).add_key(new_key(ACME, 1)[1]),
    "catalog": lambda redis: publication.publish(redis, PUBLISHED, "gateway-1", 1),
    "gateway": lambda redis: publication.renew(redis, PUBLISHED, "gateway-1", 1),
    "gateway that stops": lambda redis: publication.forget_gateway(redis, "gateway-0"),
    "refill": lambda redis: Refills(redis).put(ZETA, REFILL),
    "refill set up before": lambda redis: Refills(redis).put(ACME, REFILL),
    "webhook": lambda redis: Inbox(redis).receive(NEW, 1),
    "webhook that is finished": lambda redis: Inbox(redis).finish(STORED),
    "webhook that waits": lambda redis: Inbox(redis).park(STORED, 2),
    "webhook that is due later": lambda redis: Inbox(redis).reschedule([STORED.id], 9),
    "old webhooks": lambda redis: Inbox(redis).prune(100),
    "purchase": lambda redis: Inbox(redis).fix_purchase("pay_1", [BOUGHT]),
    "ids at Dodo": lambda redis: keep_ids(redis, {"pack:small": "prod_1"}),
    "archive": lambda redis: ArchiveCursor(redis).announce("file:///archive"),
    "watermark": lambda redis: Watermarks(redis).keep(shard_for(ACME), Mark("1-0")),
    "exporter": lambda redis: Outbox(redis).show(ExporterState()),
    "reconciliation": lambda redis: proof_state.show(redis, "store", ProofState()),
    "notices that were sent": lambda redis: Notices(redis).note_sent(Sent("1-0")),
    "unresolved settlement": lambda redis: Ledger(redis).recovery.drop(RequestId("req_1")),
    "addresses": flush_an_address,
}


@pytest.fixture(autouse=True)
async def _emptied(server: valkey.Valkey) -> AsyncIterator[None]:
    """No other test finds a store of another version."""
    yield
    redis = await reach(server.url)
    await redis.flushall()
    await redis.aclose()


async def fill(store: Redis) -> None:
    """Store something for each of the writes to change."""
    await verify(store)
    await Tenants(store).create(tenant(ACME))
    await Refills(store).put(ACME, REFILL.model_copy(update={"threshold_nanos": 2}))
    await publication.renew(store, PUBLISHED, "gateway-0", 1)
    inbox = Inbox(store)
    await inbox.receive(STORED, 1)
    await inbox.receive(OLD, 1)
    await inbox.finish(OLD)
    lost = {"settlement": pack_settlement(settlement()), "reason": "lost", "at": "1"}
    await store.hset(shard_for(ACME).unresolved, "req_1", json.dumps(lost))


@pytest.fixture
async def used(store: Redis) -> Redis:
    await fill(store)
    return store


@pytest.mark.parametrize("what", WRITES)
async def test_write_to_a_migrated_store_is_refused(used: Redis, what: str) -> None:
    await used.hset(META, "schema", f"{SCHEMA}>{SCHEMA + 1}")
    for fence in FENCES:
        await used.set(fence, str(SCHEMA + 1))
    before = await recorded.contents(used)
    with pytest.raises(StoreUnavailable, match=f"the store has schema {SCHEMA}>{SCHEMA + 1}"):
        await WRITES[what](used)
    assert await recorded.contents(used) == before


@pytest.mark.parametrize("what", WRITES)
async def test_write_to_a_store_of_this_version_is_made(used: Redis, what: str) -> None:
    before = await recorded.contents(used)
    await WRITES[what](used)
    assert await recorded.contents(used) != before


async def test_watermark_of_many_tenants_is_kept(store: Redis) -> None:
    mark = Mark("1-0", {TenantId(f"tenant_{number}"): "sums" for number in range(10_000)}, 1)
    assert len(mark.folds) * 2 > 2 * watermark.WORDS
    await Watermarks(store).keep(shard_for(ACME), Mark("0-1", {ZETA: "old"}))
    await Watermarks(store).keep(shard_for(ACME), mark)
    assert (await Watermarks(store).all())[shard_for(ACME).number] == mark
