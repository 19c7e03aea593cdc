"""Checkout sessions: a cart and a customer, and the payment of the cart.

A session is paid once. The whole cart is one payment, and each recurring line starts a subscription. A session with an
email and no customer id uses the customer who has that email.
"""

from datetime import datetime, timedelta
from typing import Annotated, ClassVar

from fastapi import APIRouter
from pydantic import Field

from cluster.dodo_sandbox.customers import CreateCustomer, CustomerRecord, Email, create, customer_of, save_card
from cluster.dodo_sandbox.entitlements import issue
from cluster.dodo_sandbox.errors import ApiError, bad_request, not_found, unprocessable
from cluster.dodo_sandbox.payments import (
    CartItem,
    Charge,
    Line,
    PaymentRecord,
    PaymentStatus,
    ServicePeriod,
    charge,
    line,
    payment_of,
)
from cluster.dodo_sandbox.products import OneTimePrice, ProductRecord, RecurringPrice, UsageBasedPrice, product_of
from cluster.dodo_sandbox.state import Sandbox, SandboxDep
from cluster.dodo_sandbox.subscriptions import Start, SubscriptionRecord, change, new_subscription
from cluster.dodo_sandbox.wire import Cents, LimitedMetadata, Resource, Wire, new_id

CART_MAX = 20
LIFETIME = timedelta(hours=24)

router = APIRouter()


WebUrl = Annotated[str, Field(pattern=r"^https?://[^\s/]+")]


class CartLine(Wire):
    product_id: str
    quantity: Annotated[int, Field(ge=1, le=10_000)]
    amount: Cents | None = None


class SessionCustomer(Wire):
    customer_id: str | None = None
    email: Email | None = None
    name: str | None = None
    phone_number: str | None = None


class SubscriptionData(Wire):
    trial_period_days: Annotated[int, Field(ge=0)] | None = None
    on_demand: dict[str, object] | None = None


class CreateSession(Wire):
    product_cart: Annotated[list[CartLine], Field(min_length=1, max_length=CART_MAX)]
    customer: SessionCustomer | None = None
    return_url: WebUrl | None = None
    cancel_url: WebUrl | None = None
    metadata: LimitedMetadata | None = None
    subscription_data: SubscriptionData | None = None
    confirm: bool = False
    payment_method_id: str | None = None


class SessionRecord(Resource):
    kind: ClassVar[str] = "session"
    id: str
    created_at: datetime
    request: CreateSession
    payment_id: str | None = None

    @property
    def key(self) -> str:
        return self.id


class SessionCreated(Wire):
    session_id: str
    checkout_url: str | None
    payment_id: str | None = None


class SessionStatus(Wire):
    id: str
    created_at: datetime
    customer_email: str | None = None
    customer_name: str | None = None
    payment_id: str | None = None
    payment_status: PaymentStatus | None = None


def session_of(sandbox: Sandbox, session_id: str) -> SessionRecord:
    """Raises ApiError 404 for an unknown id."""
    session = sandbox.store.get(SessionRecord, session_id)
    if session is None:
        raise not_found("checkout session", session_id)
    return session


def open_session(sandbox: Sandbox, request: CreateSession) -> SessionRecord:
    """Raises ApiError for a cart that Dodo refuses, or an unknown customer."""
    for item in request.product_cart:
        check_item(sandbox, item)
    if len({product_of(sandbox, item.product_id).price.currency for item in request.product_cart}) > 1:
        raise bad_request("All products of a cart have one currency")
    if request.subscription_data is not None and request.subscription_data.on_demand:
        raise unprocessable("The sandbox does not model on-demand subscriptions")
    if request.customer is not None and request.customer.customer_id is not None:
        customer_of(sandbox, request.customer.customer_id)
    session = SessionRecord(id=new_id("cks"), created_at=sandbox.clock.now(), request=request)
    sandbox.store.put(session)
    return session


def check_item(sandbox: Sandbox, item: CartLine) -> None:
    product = product_of(sandbox, item.product_id)
    if product.archived_at is not None:
        raise bad_request(f"Product {item.product_id} is archived", "PRODUCT_ARCHIVED")
    if isinstance(product.price, UsageBasedPrice) and item.quantity != 1:
        raise bad_request("Quantity must be 1 for usage based products", "INVALID_QUANTITY")
    low = isinstance(product.price, OneTimePrice) and product.price.pay_what_you_want
    if low and item.amount is not None and item.amount < product.price.price:  # type: ignore[union-attr]
        raise bad_request("The amount is below the product's minimum", "INVALID_AMOUNT")


def pay(sandbox: Sandbox, session_id: str, declined: bool = False) -> PaymentRecord:
    """Charge the session's cart. After a declined payment the session can be paid again.

    Raises:
        ApiError: 404 for an unknown session, 409 for a paid one, 400 for one older than 24 hours.
    """
    session, now = session_of(sandbox, session_id), sandbox.clock.now()
    if session.payment_id and payment_of(sandbox, session.payment_id).status == "succeeded":
        raise ApiError(409, "CHECKOUT_SESSION_CONSUMED", "The checkout session was paid already")
    if now - session.created_at > LIFETIME:
        raise bad_request("The checkout session has expired", "CHECKOUT_SESSION_EXPIRED")
    with sandbox.store.transaction():
        customer = payer(sandbox, session.request.customer)
        method = save_card(sandbox, customer)
        starts = [_start(sandbox, session, item, customer, method, now) for item in _recurring(sandbox, session)]
        payment = charge(sandbox, _cart_charge(sandbox, session, customer, starts, method), now, declined)
        sandbox.store.put(session.model_copy(update={"payment_id": payment.payment_id}))
        status = "active" if payment.status == "succeeded" else "failed"
        for subscription in starts:
            change(sandbox, subscription, f"subscription.{status}", now, status=status, payment_id=payment.payment_id)
        if payment.status == "succeeded":
            _issue_licence_keys(sandbox, session, payment)
    return payment


def _issue_licence_keys(sandbox: Sandbox, session: SessionRecord, payment: PaymentRecord) -> None:
    """One licence key for each unit of a one-time product. Subscriptions get theirs when they start."""
    for item, product in _products(sandbox, session):
        if not product.is_recurring:
            customer_id, at = payment.customer.customer_id, payment.created_at
            issue(
                sandbox,
                product.product_id,
                product.entitlements,
                customer_id,
                at,
                item.quantity,
                payment_id=payment.payment_id,
            )


def payer(sandbox: Sandbox, given: SessionCustomer | None) -> CustomerRecord:
    if given is not None and given.customer_id is not None:
        return customer_of(sandbox, given.customer_id)
    email = (given and given.email) or "guest@example.com"
    for known in sandbox.store.find(CustomerRecord):
        if known.email == email:
            return known
    name = (given and given.name) or email
    return create(sandbox, CreateCustomer(email=email, name=name, phone_number=given.phone_number if given else None))


def _products(sandbox: Sandbox, session: SessionRecord) -> list[tuple[CartLine, ProductRecord]]:
    return [(item, product_of(sandbox, item.product_id)) for item in session.request.product_cart]


def _recurring(sandbox: Sandbox, session: SessionRecord) -> list[CartLine]:
    return [item for item, product in _products(sandbox, session) if product.is_recurring]


def _trial_days(session: SessionRecord, product: ProductRecord) -> int:
    data = session.request.subscription_data
    if data is not None and data.trial_period_days is not None:
        return data.trial_period_days
    return product.price.trial_period_days if isinstance(product.price, RecurringPrice) else 0


def _start(
    sandbox: Sandbox, session: SessionRecord, item: CartLine, customer: CustomerRecord, method: str, now: datetime
) -> SubscriptionRecord:
    start = Start(
        subscription_id=new_id("sub"),
        customer_id=customer.customer_id,
        product_id=item.product_id,
        quantity=item.quantity,
        metadata=session.request.metadata or {},
        payment_method_id=method,
        trial_period_days=_trial_days(session, product_of(sandbox, item.product_id)),
    )
    return new_subscription(sandbox, start, now)


def currency_of(sandbox: Sandbox, session: SessionRecord) -> str:
    """The currency of all its products."""
    return product_of(sandbox, session.request.product_cart[0].product_id).price.currency


def cart_lines(sandbox: Sandbox, session: SessionRecord) -> list[Line]:
    """What is due today, before tax: nothing for a trial."""
    lines = []
    for item, product in _products(sandbox, session):
        amount = unit_amount(product, item) * item.quantity
        due = 0 if product.is_recurring and _trial_days(session, product) else amount
        lines.append(line(f"{product.name} x {item.quantity}", due, product.description))
    return lines


def unit_amount(product: ProductRecord, item: CartLine) -> int:
    price = product.price
    match price:
        case UsageBasedPrice():
            return price.fixed_price
        case OneTimePrice(pay_what_you_want=True):
            return item.amount if item.amount is not None else price.suggested_price or price.price
        case _:
            return price.price


def _cart_charge(
    sandbox: Sandbox, session: SessionRecord, customer: CustomerRecord, starts: list[SubscriptionRecord], method: str
) -> Charge:
    bought = [
        CartItem(product_id=item.product_id, quantity=item.quantity)
        for item, product in _products(sandbox, session)
        if not product.is_recurring
    ]
    periods = [
        ServicePeriod(
            subscription_id=one.subscription_id, starts_at=one.previous_billing_date, ends_at=one.next_billing_date
        )
        for one in starts
    ]
    return Charge(
        customer_id=customer.customer_id, currency=currency_of(sandbox, session),
        lines=cart_lines(sandbox, session), metadata=session.request.metadata or {},
        charge_type="new" if starts else None, subscription_ids=[one.subscription_id for one in starts],
        service_periods=periods, product_cart=bought or None, checkout_session_id=session.id, payment_method_id=method,
    )  # fmt: skip


@router.post("/checkouts")
async def create_session(request: CreateSession, sandbox: SandboxDep) -> SessionCreated:
    """With ``confirm`` and a saved payment method, charge at once without a checkout page."""
    if request.payment_method_id is None:
        session = open_session(sandbox, request)
        return SessionCreated(session_id=session.id, checkout_url=f"{sandbox.public_url}/checkout/{session.id}")
    if not request.confirm or request.customer is None or request.customer.customer_id is None:
        raise bad_request("payment_method_id needs confirm and an existing customer_id")
    customer = customer_of(sandbox, request.customer.customer_id)
    if request.payment_method_id not in [method.payment_method_id for method in customer.payment_methods]:
        raise not_found("payment method", request.payment_method_id)
    with sandbox.store.transaction():
        session = open_session(sandbox, request)
        payment = pay(sandbox, session.id)
    return SessionCreated(session_id=session.id, checkout_url=None, payment_id=payment.payment_id)


@router.get("/checkouts/{session_id}")
async def retrieve_session(session_id: str, sandbox: SandboxDep) -> SessionStatus:
    session = session_of(sandbox, session_id)
    payment = payment_of(sandbox, session.payment_id) if session.payment_id else None
    asked = session.request.customer or SessionCustomer()
    known = sandbox.store.get(CustomerRecord, asked.customer_id) if asked.customer_id else None
    return SessionStatus(
        id=session.id,
        created_at=session.created_at,
        payment_id=session.payment_id,
        customer_email=known.email if known else asked.email,
        customer_name=known.name if known else asked.name,
        payment_status=payment.status if payment else None,
    )
