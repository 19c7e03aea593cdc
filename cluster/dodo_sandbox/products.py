"""Products with their three kinds of price, and Dodo's limits for metered prices.

A product with credit entitlements is refused, since the sandbox does not have them.
"""

from datetime import datetime
from decimal import Decimal
from typing import Annotated, ClassVar, Literal

from fastapi import APIRouter, Query, Response
from pydantic import AfterValidator, Field

from cluster.dodo_sandbox.entitlements import Attached, EntitlementSummary, entitlement_of, summary
from cluster.dodo_sandbox.errors import bad_request, not_found, unprocessable
from cluster.dodo_sandbox.meters import meter_of
from cluster.dodo_sandbox.state import Sandbox, SandboxDep
from cluster.dodo_sandbox.wire import (
    BRAND_ID,
    BUSINESS_ID,
    Cents,
    Currency,
    Interval,
    LimitedMetadata,
    Page,
    Paging,
    Resource,
    Wire,
    new_id,
)

METERS_PER_PRODUCT_MAX = 10
PERIOD_YEARS_MAX = 20
_DAYS = {"Day": 1, "Week": 7, "Month": 30, "Year": 365}

router = APIRouter()


def _above_zero(price: str) -> str:
    if Decimal(price) <= 0:
        raise ValueError("price_per_unit must be greater than zero")
    return price


UnitPrice = Annotated[str, Field(pattern=r"^\d{1,5}(\.\d{1,12})?$"), AfterValidator(_above_zero)]
"""Cents per unit as a decimal string, 5 digits before and 12 after the point (the SDK's AddMeterToPrice)."""

Count = Annotated[int, Field(ge=1, le=10_000)]


class MeterPrice(Wire):
    meter_id: str
    price_per_unit: UnitPrice | None = None
    free_threshold: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    credit_entitlement_id: str | None = None
    name: str | None = None
    description: str | None = None
    measurement_unit: str | None = None


class PriceBase(Wire):
    currency: Currency
    discount: Annotated[int, Field(ge=0, le=100)]
    purchasing_power_parity: bool
    tax_inclusive: bool | None = None


class OneTimePrice(PriceBase):
    type: Literal["one_time_price"]
    price: Cents
    pay_what_you_want: bool = False
    suggested_price: Cents | None = None


class PeriodicPrice(PriceBase):
    payment_frequency_count: Count
    payment_frequency_interval: Interval
    subscription_period_count: Count
    subscription_period_interval: Interval


class RecurringPrice(PeriodicPrice):
    type: Literal["recurring_price"]
    price: Cents
    trial_period_days: Annotated[int, Field(ge=0)] = 0


class UsageBasedPrice(PeriodicPrice):
    type: Literal["usage_based_price"]
    fixed_price: Cents
    meters: list[MeterPrice] | None = None


Price = Annotated[OneTimePrice | RecurringPrice | UsageBasedPrice, Field(discriminator="type")]
TaxCategory = Literal["digital_products", "saas", "e_book", "edtech", "live_tutoring"]


class Product(Wire):
    brand_id: str = BRAND_ID
    business_id: str = BUSINESS_ID
    created_at: datetime
    credit_entitlements: list[str] = Field(default_factory=list)
    entitlements: list[EntitlementSummary] = Field(default_factory=list)
    is_recurring: bool
    license_key_enabled: bool = False
    metadata: LimitedMetadata = Field(default_factory=dict)
    price: Price
    product_id: str
    tax_category: TaxCategory
    updated_at: datetime
    name: str | None = None
    description: str | None = None


class ListedProduct(Wire):
    """A product in a list: the price as a number, and its details in another field."""

    business_id: str = BUSINESS_ID
    created_at: datetime
    entitlements: list[EntitlementSummary] = Field(default_factory=list)
    is_recurring: bool
    metadata: LimitedMetadata
    product_id: str
    tax_category: TaxCategory
    updated_at: datetime
    currency: str
    description: str | None
    name: str | None
    price: int
    price_detail: Price


class ProductRecord(Product, Resource):
    kind: ClassVar[str] = "product"
    archived_at: datetime | None = None

    @property
    def key(self) -> str:
        return self.product_id


class CreateProduct(Wire):
    name: Annotated[str, Field(min_length=1, max_length=255)]
    price: Price
    tax_category: TaxCategory
    description: str | None = None
    metadata: LimitedMetadata = Field(default_factory=dict)
    credit_entitlements: list[object] | None = None
    entitlements: Annotated[list[Attached], Field(max_length=50)] | None = None


class UpdateProduct(Wire):
    name: str | None = None
    price: Price | None = None
    tax_category: TaxCategory | None = None
    description: str | None = None
    metadata: LimitedMetadata | None = None


class ProductFilter(Paging):
    archived: bool = False
    recurring: bool | None = None


def amount_of(price: Price) -> int:
    """Cents due at each charge, before tax and usage."""
    return price.fixed_price if isinstance(price, UsageBasedPrice) else price.price


def product_of(sandbox: Sandbox, product_id: str) -> ProductRecord:
    """Raises ApiError 404 for an unknown id."""
    product = sandbox.store.get(ProductRecord, product_id)
    if product is None:
        raise not_found("product", product_id)
    return product


def checked_price(sandbox: Sandbox, price: Price) -> Price:
    """The price with the names of its meters. Raises ApiError for a price that Dodo refuses."""
    if isinstance(price, OneTimePrice):
        return price
    days = price.subscription_period_count * _DAYS[price.subscription_period_interval]
    if days > PERIOD_YEARS_MAX * 366:
        raise bad_request(f"A subscription period is at most {PERIOD_YEARS_MAX} years")
    if not isinstance(price, UsageBasedPrice):
        return price
    meters = price.meters or []
    if not 1 <= len(meters) <= METERS_PER_PRODUCT_MAX:
        raise bad_request(f"A usage based price has 1 to {METERS_PER_PRODUCT_MAX} meters")
    if len({meter.meter_id for meter in meters}) != len(meters):
        raise bad_request("A price has each meter once")
    return price.model_copy(update={"meters": [_described(sandbox, meter) for meter in meters]})


def _described(sandbox: Sandbox, priced: MeterPrice) -> MeterPrice:
    meter = meter_of(sandbox, priced.meter_id)
    if priced.credit_entitlement_id is not None:
        raise unprocessable("The sandbox does not model credit entitlements")
    if priced.price_per_unit is None:
        raise bad_request("price_per_unit is required")
    return priced.model_copy(
        update={"name": meter.name, "description": meter.description, "measurement_unit": meter.measurement_unit}
    )


def listed(product: Product) -> ListedProduct:
    fields = {name: getattr(product, name) for name in ListedProduct.model_fields if hasattr(product, name)}
    money = {"price": amount_of(product.price), "price_detail": product.price, "currency": product.price.currency}
    return ListedProduct(**(fields | money))


@router.post("/products")
async def create_product(request: CreateProduct, sandbox: SandboxDep) -> Product:
    if request.credit_entitlements:
        raise unprocessable("The sandbox does not model credit entitlements")
    price, now = checked_price(sandbox, request.price), sandbox.clock.now()
    product = ProductRecord(
        product_id=new_id("pdt"),
        name=request.name,
        description=request.description,
        price=price,
        is_recurring=not isinstance(price, OneTimePrice),
        tax_category=request.tax_category,
        metadata=request.metadata,
        entitlements=[summary(entitlement_of(sandbox, one.entitlement_id)) for one in request.entitlements or []],
        created_at=now,
        updated_at=now,
    )
    sandbox.store.put(product)
    return product


@router.get("/products")
async def list_products(filters: Annotated[ProductFilter, Query()], sandbox: SandboxDep) -> Page[ListedProduct]:
    return filters.of(
        [
            listed(product)
            for product in sandbox.store.find(ProductRecord)
            if (product.archived_at is not None) == filters.archived
            and filters.recurring in (None, product.is_recurring)
        ]
    )


@router.get("/products/{product_id}")
async def retrieve_product(product_id: str, sandbox: SandboxDep) -> Product:
    return product_of(sandbox, product_id)


@router.patch("/products/{product_id}")
async def update_product(product_id: str, request: UpdateProduct, sandbox: SandboxDep) -> Response:
    product = product_of(sandbox, product_id)
    change = {name: value for name, value in request if value is not None} | {"updated_at": sandbox.clock.now()}
    if request.price is not None:
        if request.price.type != product.price.type:
            raise bad_request("A product keeps its type of price")
        change["price"] = checked_price(sandbox, request.price)
    sandbox.store.put(product.model_copy(update=change))
    return Response(status_code=200)


@router.delete("/products/{product_id}")
async def archive_product(product_id: str, sandbox: SandboxDep) -> Response:
    sandbox.store.put(product_of(sandbox, product_id).model_copy(update={"archived_at": sandbox.clock.now()}))
    return Response(status_code=200)


@router.post("/products/{product_id}/unarchive")
async def unarchive_product(product_id: str, sandbox: SandboxDep) -> Response:
    sandbox.store.put(product_of(sandbox, product_id).model_copy(update={"archived_at": None}))
    return Response(status_code=200)
