"""Makes at Dodo what our configuration sells: one meter, products for packs and postpaid plans, the webhook.

Run it any number of times: what exists is found again, nothing is deleted or changed, and what
differs from the configuration is reported.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation

from dodopayments.types.price_param import OneTimePrice, PriceParam, UsageBasedPrice
from redis.asyncio import Redis

from billing.catalog.catalog import Catalog
from billing.commerce.dodo_ids import all_ids, keep_ids
from billing.commerce.inbox import CHARGE_METER
from billing.commerce.licences import ENTITLEMENT
from billing.dodo.client import Dodo
from billing.dodo.wire import DodoMeter, DodoProduct
from billing.export.events import CHARGE
from billing.money import NANOS_PER_CENT, divide_up

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
    """Our names of what was made now, or would be, such as ``pack:small``."""
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
    meter_id: str | None = None
    """``None`` for a product sold once."""
    hands_out_key: bool = False

    @property
    def price(self) -> PriceParam:
        if self.meter_id is None:
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
        kind = "one_time_price" if self.meter_id is None else "usage_based_price"
        pairs = [("kind", kind, product.kind), ("cents", str(self.cents), str(product.cents))]
        pairs.append(("currency", "USD", product.currency))
        pairs.append(("licence key", str(self.hands_out_key), str(product.hands_out_key)))
        if self.meter_id is not None:
            meters = {m.meter_id: m for m in product.meters}
            price = meters[self.meter_id].price_per_unit if self.meter_id in meters else "none"
            pairs.append(("price_per_unit", CENTS_PER_NANO, price))
            pairs.append(("free_threshold", "0", str(sum(m.free_threshold for m in product.meters))))
        for what, ours, theirs in pairs:
            if not _is_same(ours, theirs):
                yield Drift(self.name, what, ours, theirs)


async def plan(dodo: Dodo, redis: Redis, catalog: Catalog, webhook_url: str = "") -> SyncReport:
    """What ``sync`` would make and what it would find; changes nothing, here or there. Raises as ``sync``."""
    return await _Sync(dodo, is_dry=True).run(redis, catalog, webhook_url)


async def sync(dodo: Dodo, redis: Redis, catalog: Catalog, webhook_url: str = "") -> SyncReport:
    """Bring Dodo in line with the catalog; with ``webhook_url`` also have its events sent there.

    Raises:
        DodoUnavailable, DodoRefused: run it again; what was made until then is found.
    """
    return await _Sync(dodo, is_dry=False).run(redis, catalog, webhook_url)


@dataclass
class _Sync:
    """One pass over what we want at Dodo; a dry one only notes what is missing."""

    dodo: Dodo
    is_dry: bool
    created: list[str] = field(default_factory=list)
    drift: list[Drift] = field(default_factory=list)
    ids: dict[str, str] = field(default_factory=dict)
    """Dodo's id by our name; empty for what a dry pass would make."""

    async def run(self, redis: Redis, catalog: Catalog, webhook_url: str) -> SyncReport:
        known = await all_ids(redis)
        await self._meter(known)
        sold = [pack.licence_key for pack in catalog.packs.values()]
        if any([*sold, *(plan.licence_key for plan in catalog.plans.values())]):
            await self._entitlement()
        await self._products(known, catalog)
        secret = await self._webhook(webhook_url) if webhook_url else ""
        if not self.is_dry:
            await keep_ids(redis, self.ids)
        found = tuple(name for name in self.ids if name not in self.created)
        return SyncReport(tuple(self.created), found, tuple(self.drift), secret)

    async def _meter(self, known: Mapping[str, str]) -> None:
        meter = _find_meter(known.get(CHARGE_METER, ""), await self.dodo.meters())
        if meter is None:
            self.created.append(CHARGE_METER)
            if not self.is_dry:
                meter = await self.dodo.create_meter("Farebox charges", CHARGE, METER_KEY, "nano-USD")
        self.ids[CHARGE_METER] = meter.id if meter else ""

    async def _entitlement(self) -> None:
        """The one entitlement whose licence keys are API keys."""
        found = (await self.dodo.licence_entitlements()).get(ENTITLEMENT, "")
        if not found:
            self.created.append(ENTITLEMENT)
            if not self.is_dry:
                found = await self.dodo.create_licence_entitlement(ENTITLEMENT, "Farebox API key")
        self.ids[ENTITLEMENT] = found

    async def _products(self, known: Mapping[str, str], catalog: Catalog) -> None:
        by_id, by_tag = _index(await self.dodo.products())
        for wanted in _wanted(catalog, self.ids[CHARGE_METER]):
            product = by_id.get(known.get(wanted.name, "")) or by_tag.get(wanted.name)
            if product is not None:
                self.drift += wanted.drift(await self.dodo.retrieve_product(product.id))
            else:
                self.created.append(wanted.name)
                if not self.is_dry:
                    given = [self.ids[ENTITLEMENT]] if wanted.hands_out_key else []
                    product = await self.dodo.create_product(wanted.name, wanted.title, wanted.price, given)
            self.ids[wanted.name] = product.id if product else ""

    async def _webhook(self, url: str) -> str:
        """The secret of the endpoint of this address; empty for one that a dry pass would make."""
        endpoint = next((one.id for one in await self.dodo.webhooks() if one.url == url), "")
        if not endpoint:
            self.created.append(WEBHOOK)
            if not self.is_dry:
                key = "farebox-" + hashlib.sha256(url.encode()).hexdigest()[:32]
                endpoint = (await self.dodo.create_webhook(url, key)).id
        self.ids[WEBHOOK] = endpoint
        return await self.dodo.webhook_secret(endpoint) if endpoint else ""


def _wanted(catalog: Catalog, meter_id: str) -> list[_Wanted]:
    packs = [
        _Wanted(f"pack:{name}", f"Credit pack {name}", divide_up(pack.price, NANOS_PER_CENT), None, pack.licence_key)
        for name, pack in catalog.packs.items()
    ]
    plans = [
        _Wanted(
            f"plan:{name}", f"Plan {name}", divide_up(plan.monthly_price, NANOS_PER_CENT), meter_id, plan.licence_key
        )
        for name, plan in catalog.plans.items()
        if plan.is_postpaid
    ]
    return packs + plans


def _find_meter(known_id: str, meters: list[DodoMeter]) -> DodoMeter | None:
    """The meter we made, or one that sums the same thing: two of them would charge twice."""
    fits = [m for m in meters if (m.event_name, m.aggregation, m.key) == (CHARGE, "sum", METER_KEY)]
    return next((m for m in fits if m.id == known_id), fits[0] if fits else None)


def _index(products: list[DodoProduct]) -> tuple[Mapping[str, DodoProduct], Mapping[str, DodoProduct]]:
    return {p.id: p for p in products}, {p.tag: p for p in reversed(products) if p.tag}


def _is_same(ours: str, theirs: str) -> bool:
    """Equal as text, or as numbers: Dodo may write 0.0000001 as 1E-7 or with more zeros."""
    if ours == theirs:
        return True
    try:
        return Decimal(ours) == Decimal(theirs)
    except InvalidOperation:
        return False
