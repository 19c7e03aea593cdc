"""Customers, their saved payment methods and their portal sessions.

Two customers may have the same email. Only a checkout with an email instead of an id looks for an existing customer.
"""

from datetime import datetime
from typing import Annotated, ClassVar

from fastapi import APIRouter, Query
from pydantic import Field

from cluster.dodo_sandbox.errors import not_found
from cluster.dodo_sandbox.state import Sandbox, SandboxDep
from cluster.dodo_sandbox.wire import BUSINESS_ID, LimitedMetadata, Page, Paging, Resource, UtcTime, Wire, new_id

router = APIRouter()

Email = Annotated[str, Field(pattern=r"^[^@\s]+@[^@\s]+$", max_length=320)]


class Customer(Wire):
    business_id: str = BUSINESS_ID
    created_at: datetime
    customer_id: str
    email: str
    name: str
    metadata: LimitedMetadata = Field(default_factory=dict)
    phone_number: str | None = None


class Card(Wire):
    """A card without a number, since none is real."""

    card_network: str = "visa"
    card_type: str = "credit"
    last4_digits: str = "4242"
    expiry_month: str = "12"
    expiry_year: str = "2099"


class PaymentMethod(Wire):
    payment_method_id: str
    payment_method: str = "card"
    card: Card = Card()
    last_used_at: datetime
    recurring_enabled: bool = True


class PaymentMethods(Wire):
    items: list[PaymentMethod]


class CustomerRecord(Customer, Resource):
    """``card_declines``: every charge of this customer fails."""

    kind: ClassVar[str] = "customer"
    payment_methods: list[PaymentMethod] = Field(default_factory=list)
    card_declines: bool = False
    balance: int = 0
    """Cents that downgrades have credited; invoices of subscriptions use them before the card."""

    @property
    def key(self) -> str:
        return self.customer_id


class CustomerLimitedDetails(Wire):
    """The customer's fields in payments and subscriptions."""

    customer_id: str
    email: str
    name: str
    metadata: LimitedMetadata = Field(default_factory=dict)
    phone_number: str | None = None


class CreateCustomer(Wire):
    email: Email
    name: str
    metadata: LimitedMetadata = Field(default_factory=dict)
    phone_number: str | None = None


class UpdateCustomer(Wire):
    email: Email | None = None
    name: str | None = None
    metadata: LimitedMetadata | None = None
    phone_number: str | None = None


class CustomerFilter(Paging):
    email: str | None = None
    name: str | None = None
    created_at_gte: UtcTime | None = None
    created_at_lte: UtcTime | None = None

    def admits(self, customer: Customer) -> bool:
        return (
            (self.email is None or customer.email == self.email)
            and (self.name is None or self.name.lower() in customer.name.lower())
            and (self.created_at_gte is None or customer.created_at >= self.created_at_gte)
            and (self.created_at_lte is None or customer.created_at <= self.created_at_lte)
        )


class PortalSession(Wire):
    link: str


def limited(customer: Customer) -> CustomerLimitedDetails:
    return CustomerLimitedDetails(
        customer_id=customer.customer_id,
        email=customer.email,
        name=customer.name,
        metadata=customer.metadata,
        phone_number=customer.phone_number,
    )


def customer_of(sandbox: Sandbox, customer_id: str) -> CustomerRecord:
    """Raises ApiError 404 for an unknown id."""
    customer = sandbox.store.get(CustomerRecord, customer_id)
    if customer is None:
        raise not_found("customer", customer_id)
    return customer


def create(sandbox: Sandbox, request: CreateCustomer) -> CustomerRecord:
    customer = CustomerRecord(customer_id=new_id("cus"), created_at=sandbox.clock.now(), **request.model_dump())
    sandbox.store.put(customer)
    return customer


def add_to_balance(sandbox: Sandbox, customer_id: str, cents: int) -> None:
    customer = customer_of(sandbox, customer_id)
    sandbox.store.put(customer.model_copy(update={"balance": customer.balance + cents}))


def save_card(sandbox: Sandbox, customer: CustomerRecord) -> str:
    """The id of the customer's card, which the first payment creates."""
    if customer.payment_methods:
        return customer.payment_methods[0].payment_method_id
    method = PaymentMethod(payment_method_id=new_id("pm"), last_used_at=sandbox.clock.now())
    sandbox.store.put(customer.model_copy(update={"payment_methods": [method]}))
    return method.payment_method_id


@router.post("/customers")
async def create_customer(request: CreateCustomer, sandbox: SandboxDep) -> Customer:
    return create(sandbox, request)


@router.get("/customers")
async def list_customers(filters: Annotated[CustomerFilter, Query()], sandbox: SandboxDep) -> Page[Customer]:
    return filters.of([customer for customer in sandbox.store.find(CustomerRecord) if filters.admits(customer)])


@router.get("/customers/{customer_id}")
async def retrieve_customer(customer_id: str, sandbox: SandboxDep) -> Customer:
    return customer_of(sandbox, customer_id)


@router.patch("/customers/{customer_id}")
async def update_customer(customer_id: str, request: UpdateCustomer, sandbox: SandboxDep) -> Customer:
    customer = customer_of(sandbox, customer_id).model_copy(update=request.model_dump(exclude_none=True))
    sandbox.store.put(customer)
    return customer


@router.post("/customers/{customer_id}/customer-portal/session")
async def create_portal_session(customer_id: str, sandbox: SandboxDep) -> PortalSession:
    customer = customer_of(sandbox, customer_id)
    return PortalSession(link=f"{sandbox.public_url}/portal/{customer.customer_id}")


@router.get("/customers/{customer_id}/payment-methods")
async def list_payment_methods(customer_id: str, sandbox: SandboxDep) -> PaymentMethods:
    return PaymentMethods(items=customer_of(sandbox, customer_id).payment_methods)
