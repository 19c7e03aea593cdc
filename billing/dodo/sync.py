"""Makes at Dodo what our configuration sells: one meter, products for packs and postpaid plans, the webhook.

Run it any number of times: what exists is found again, nothing is deleted or changed, and what
differs from the configuration is reported.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from typing import cast

from dodopayments.types.price_param import OneTimePrice, PriceParam, UsageBasedPrice
from redis.asyncio import Redis

from billing.catalogue import Catalogue
from billing.dodo.client import Dodo
from billing.dodo.wire import DodoMeter, DodoProduct
from billing.export.events import CHARGE
from billing.money import NANOS_PER_CENT, divide_up
from billing.store.connection import guarded
from billing.store.inbox import CHARGE_METER
from billing.store.keys import DODO_IDS
from billing.store.stream import BULK_DEADLINE_S

WEBHOOK = "webhook"
METER_KEY = "charge_nanos"
CENTS_PER_NANO = "0.0000001"
"""One nano in cents, as a meter's price: Dodo invoices exactly what the ledger drew from exposure."""


@dataclass(frozen=True, slots=True)
class Drift:
    """Something at Dodo that is not as our configuration says. Nothing was changed."""

    name: str
    what: str
    ours: str
    theirs: str


@dataclass(frozen=True, slots=True)
class SyncReport:
    created: tuple[str, ...]
    """Our names of what was made now, such as ``pack:small``."""
    found: tuple[str, ...]
    drift: tuple[Drift, ...]
    webhook_secret: str = field(default="", repr=False)
    """What the endpoint's deliveries are signed with; empty where no endpoint was asked for."""


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A product as our configuration describes it."""

    name: str
    title: str
    cents: int
    meter_id: str = ""
    """Empty for a product sold once."""

    @property
    def price(self) -> PriceParam:
        if not self.meter_id:
            return OneTimePrice(type="one_time_price", price=self.cents, currency="USD")
        return UsageBasedPrice(
            type="usage_based_price",
            fixed_price=self.cents,
            currency="USD",
            payment_frequency_count=1,
            payment_frequency_interval="Month",
            subscription_period_count=20,
            subscription_period_interval="Year",
            meters=[{"meter_id": self.meter_id, "price_per_unit": CENTS_PER_NANO}],
        )

    def drift(self, product: DodoProduct) -> Iterator[Drift]:
        kind = "usage_based_price" if self.meter_id else "one_time_price"
        pairs = [("kind", kind, product.kind), ("cents", str(self.cents), str(product.cents))]
        pairs.append(("currency", "USD", product.currency))
        if self.meter_id:
            meters = {m.meter_id: m for m in product.meters}
            price = meters[self.meter_id].price_per_unit if self.meter_id in meters else "none"
            pairs.append(("price_per_unit", CENTS_PER_NANO, price))
            pairs.append(("free_threshold", "0", str(sum(m.free_threshold for m in product.meters))))
        for what, ours, theirs in pairs:
            if not _is_same(ours, theirs):
                yield Drift(self.name, what, ours, theirs)


async def sync(dodo: Dodo, redis: Redis, catalogue: Catalogue, webhook_url: str = "") -> SyncReport:
    """Bring Dodo in line with the catalogue; with ``webhook_url`` also have its events sent there.

    Raises:
        DodoUnavailable, DodoRefused: run it again; what was made until then is found.
    """
    async with guarded(BULK_DEADLINE_S):
        known = cast(dict[str, str], await redis.hgetall(DODO_IDS))
    created: list[str] = []
    ids: dict[str, str] = {}
    drift: list[Drift] = []

    meter = _find_meter(known.get(CHARGE_METER, ""), await dodo.meters())
    if meter is None:
        meter = await dodo.create_meter("Farebox charges", CHARGE, METER_KEY, "nano-USD")
        created.append(CHARGE_METER)
    ids[CHARGE_METER] = meter.id

    by_id, by_tag = _index(await dodo.products())
    for wanted in _products(catalogue, meter.id):
        product = by_id.get(known.get(wanted.name, "")) or by_tag.get(wanted.name)
        if product is None:
            product = await dodo.create_product(wanted.name, wanted.title, wanted.price)
            created.append(wanted.name)
        else:
            drift += wanted.drift(await dodo.retrieve_product(product.id))
        ids[wanted.name] = product.id

    secret = ""
    if webhook_url:
        ids[WEBHOOK], is_new = await _endpoint(dodo, webhook_url)
        created += [WEBHOOK] if is_new else []
        secret = await dodo.webhook_secret(ids[WEBHOOK])
    async with guarded(BULK_DEADLINE_S):
        await redis.hset(DODO_IDS, mapping=ids)  # type: ignore[arg-type]
    return SyncReport(tuple(created), tuple(n for n in ids if n not in created), tuple(drift), secret)


def _products(catalogue: Catalogue, meter_id: str) -> list[_Wanted]:
    packs = [
        _Wanted(f"pack:{name}", f"Credit pack {name}", divide_up(pack.price, NANOS_PER_CENT))
        for name, pack in catalogue.packs.items()
    ]
    plans = [
        _Wanted(f"plan:{name}", f"Plan {name}", divide_up(plan.monthly_price, NANOS_PER_CENT), meter_id)
        for name, plan in catalogue.plans.items()
        if plan.is_postpaid
    ]
    return packs + plans


def _find_meter(known_id: str, meters: list[DodoMeter]) -> DodoMeter | None:
    """The meter we made, or one that sums the same thing: two of them would charge twice."""
    fits = [m for m in meters if (m.event_name, m.aggregation, m.key) == (CHARGE, "sum", METER_KEY)]
    return next((m for m in fits if m.id == known_id), fits[0] if fits else None)


def _index(products: list[DodoProduct]) -> tuple[Mapping[str, DodoProduct], Mapping[str, DodoProduct]]:
    return {p.id: p for p in products}, {p.tag: p for p in reversed(products) if p.tag}


async def _endpoint(dodo: Dodo, url: str) -> tuple[str, bool]:
    """The endpoint of this address, and whether it was made now."""
    for endpoint in await dodo.webhooks():
        if endpoint.url == url:
            return endpoint.id, False
    key = "farebox-" + hashlib.sha256(url.encode()).hexdigest()[:32]
    return (await dodo.create_webhook(url, key)).id, True


def _is_same(ours: str, theirs: str) -> bool:
    """Equal as text, or as numbers: Dodo may write 0.0000001 as 1E-7 or with more zeros."""
    if ours == theirs:
        return True
    try:
        return Decimal(ours) == Decimal(theirs)
    except InvalidOperation:
        return False
