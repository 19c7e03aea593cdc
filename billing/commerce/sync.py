"""Makes at Dodo what our configuration sells: one meter, products for packs and postpaid plans, the webhook.

Run it any number of times: what exists is found again, and nothing is deleted or changed. A product that differs from
the configuration, there or in its stored terms, is left as it is, and a new one takes its place.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation

from dodopayments.types.price_param import OneTimePrice, PriceParam, UsageBasedPrice
from redis.asyncio import Redis

from billing.catalog.catalog import Catalog
from billing.catalog.publication import current
from billing.catalog.terms import Terms
from billing.commerce.dodo_ids import all_ids, keep_ids
from billing.commerce.inbox import CHARGE_METER
from billing.commerce.licences import ENTITLEMENT
from billing.commerce.products import Products, sold
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
    """A way in which the product that was sold until now differs from the configuration; a new one takes its place."""

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
    """Why products were made anew, or would be."""
    webhook_secret: str = field(default="", repr=False)
    """What the endpoint's deliveries are signed with; empty where no endpoint was asked for."""


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A product as our configuration describes it."""

    terms: Terms
    meter_id: str | None = None
    """``None`` for a product sold once."""

    @property
    def title(self) -> str:
        kind = "Credit pack" if self.terms.kind == "pack" else "Plan"
        return f"{kind} {self.terms.plain_name}"

    @property
    def cents(self) -> int:
        return divide_up(self.terms.price, NANOS_PER_CENT)

    @property
    def price(self) -> PriceParam:
        if self.meter_id is None:
            return OneTimePrice(
                type="one_time_price", price=self.cents, currency="USD", discount=0, purchasing_power_parity=False
            )
        return UsageBasedPrice(
            type="usage_based_price",
            fixed_price=self.cents,
            currency="USD",
            discount=0,
            purchasing_power_parity=False,
            payment_frequency_count=1,
            payment_frequency_interval="Month",
            subscription_period_count=20,
            subscription_period_interval="Year",
            meters=[{"meter_id": self.meter_id, "price_per_unit": CENTS_PER_NANO}],
        )

    def drift(self, product: DodoProduct) -> Iterator[Drift]:
        """What the product at Dodo has otherwise than it must for these terms."""
        kind = "one_time_price" if self.meter_id is None else "usage_based_price"
        pairs = [
            ("kind", kind, product.kind),
            ("price", _price(self.cents, "USD"), _price(product.cents, product.currency)),
        ]
        pairs.append(("licence key", _yes(self.terms.licence_key), _yes(product.hands_out_key)))
        if self.meter_id is not None:
            meters = {m.meter_id: m for m in product.meters}
            price = meters[self.meter_id].price_per_unit if self.meter_id in meters else "none"
            pairs.append(("price_per_unit", CENTS_PER_NANO, price))
            pairs.append(("free_threshold", "0", str(sum(m.free_threshold for m in product.meters))))
        for what, ours, theirs in pairs:
            if not _is_same(ours, theirs):
                yield Drift(self.terms.name, what, ours, theirs)


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
    found: list[str] = field(default_factory=list)
    """Products that need not be made."""
    drift: list[Drift] = field(default_factory=list)
    ids: dict[str, str] = field(default_factory=dict)
    """Dodo's id of the meter, the entitlement and the webhook; empty for what a dry pass would make."""

    async def run(self, redis: Redis, catalog: Catalog, webhook_url: str) -> SyncReport:
        known, wanted = await all_ids(redis), sold(catalog)
        await self._meter(known)
        if any(terms.licence_key for terms in wanted):
            await self._entitlement()
        await self._products(Products(redis), wanted, await current(redis))
        secret = await self._webhook(webhook_url) if webhook_url else ""
        if not self.is_dry:
            await keep_ids(redis, self.ids)
        found = [*(name for name in self.ids if name not in self.created), *self.found]
        return SyncReport(tuple(self.created), tuple(found), tuple(self.drift), secret)

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

    async def _products(self, products: Products, wanted: Sequence[Terms], in_force: Catalog | None) -> None:
        there, stored = await self.dodo.products(), await products.all()
        sold_before = {terms.name: terms for terms in sold(in_force)} if in_force else {}
        for terms in wanted:
            one = _Wanted(terms, self.ids[CHARGE_METER] if terms.kind == "plan" else None)
            preferred = await products.id_for(terms)
            same = [p for p in there if p.id == preferred or stored.get(p.id) == terms or p.tag == terms.key]
            same.sort(key=lambda product: product.id != preferred)
            drift: list[Drift] = []
            product_id = ""
            for product in same:
                differences = list(one.drift(await self.dodo.retrieve_product(product.id)))
                if not differences:
                    product_id = product.id
                    break
                drift = drift or differences
            if product_id:
                self.found.append(terms.name)
            else:
                before = sold_before.get(terms.name)
                changed = () if before is None or drift else terms.differences(before)
                self.drift += drift or [Drift(terms.name, *difference) for difference in changed]
                self.created.append(terms.name)
                if not self.is_dry:
                    given = [self.ids[ENTITLEMENT]] if terms.licence_key else []
                    product_id = (await self.dodo.create_product(terms.key, one.title, one.price, given)).id
            if product_id and not self.is_dry:
                await products.add(product_id, terms)

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


def _find_meter(known_id: str, meters: list[DodoMeter]) -> DodoMeter | None:
    """The meter we made, or one that sums the same thing: two of them would charge twice."""
    fits = [m for m in meters if (m.event_name, m.aggregation, m.key) == (CHARGE, "sum", METER_KEY)]
    return next((m for m in fits if m.id == known_id), fits[0] if fits else None)


def _price(cents: int, currency: str) -> str:
    return f"${cents // 100}.{cents % 100:02}" if currency == "USD" else f"{cents} minor units of {currency}"


def _yes(answer: bool) -> str:
    return "yes" if answer else "no"


def _is_same(ours: str, theirs: str) -> bool:
    """Equal as text, or as numbers: Dodo may write 0.0000001 as 1E-7 or with more zeros."""
    if ours == theirs:
        return True
    try:
        return Decimal(ours) == Decimal(theirs)
    except InvalidOperation:
        return False
