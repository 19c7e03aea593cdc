"""The customer's portal: subscriptions to cancel, keep or change, and invoices. It works without JavaScript.

At Dodo a portal's link has a session that ends; here it is the customer's id, since no money is real.
"""

from typing import Literal, cast
from urllib.parse import parse_qsl

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response

from cluster.dodo_sandbox.customers import customer_of
from cluster.dodo_sandbox.errors import ApiError, not_found
from cluster.dodo_sandbox.invoices import invoice_lines, pdf
from cluster.dodo_sandbox.pages import render
from cluster.dodo_sandbox.payments import PaymentRecord, payment_of
from cluster.dodo_sandbox.products import ProductRecord
from cluster.dodo_sandbox.state import Sandbox, SandboxDep
from cluster.dodo_sandbox.subscriptions import ENDED, SubscriptionRecord, running
from cluster.dodo_sandbox.updates import (
    ChangePlan,
    Mode,
    UpdateSubscription,
    changeable,
    edit,
    make_change,
    preview,
    withdraw_change,
)

MODE: Mode = "prorated_immediately"
"""How the portal bills a change of now; at Dodo the merchant chooses it."""

router = APIRouter(prefix="/portal/{customer_id}", include_in_schema=False)


@router.get("")
async def portal(customer_id: str, sandbox: SandboxDep) -> HTMLResponse:
    try:
        customer = customer_of(sandbox, customer_id)
    except ApiError as error:
        return render("message.html", error.status, title="No such customer", text=error.message)
    plans = [one for one in sandbox.store.find(ProductRecord) if one.is_recurring and one.archived_at is None]
    return render(
        "portal.html",
        customer=customer,
        payments=sandbox.store.find(PaymentRecord, customer_id),
        subscriptions=sandbox.store.find(SubscriptionRecord, customer_id),
        ended=ENDED,
        plans=plans[::-1],
    )


@router.get("/invoices/{payment_id}")
async def invoice(customer_id: str, payment_id: str, sandbox: SandboxDep) -> Response:
    try:
        payment = payment_of(sandbox, payment_id)
        if payment.customer.customer_id != customer_id:
            raise not_found("payment", payment_id)
    except ApiError as error:
        return render("message.html", error.status, title="No such invoice", text=error.message)
    return Response(pdf(invoice_lines(payment)), media_type="application/pdf")


@router.post("/subscriptions/{subscription_id}/cancel")
async def cancel(customer_id: str, subscription_id: str, request: Request, sandbox: SandboxDep) -> Response:
    """Cancel at the end of the period, or now."""
    now = (await _form(request)).get("when") == "now"
    wanted = UpdateSubscription(status="cancelled") if now else UpdateSubscription(cancel_at_next_billing_date=True)
    return _edited(sandbox, customer_id, subscription_id, wanted)


@router.post("/subscriptions/{subscription_id}/keep")
async def keep(customer_id: str, subscription_id: str, sandbox: SandboxDep) -> Response:
    """Withdraw a cancellation that is not in force."""
    return _edited(sandbox, customer_id, subscription_id, UpdateSubscription(cancel_at_next_billing_date=False))


def _edited(sandbox: Sandbox, customer_id: str, subscription_id: str, wanted: UpdateSubscription) -> Response:
    try:
        edit(sandbox, _own(sandbox, customer_id, subscription_id), wanted, sandbox.clock.now(), by="customer")
    except ApiError as error:
        return _failed(error)
    return _back(customer_id)


@router.get("/subscriptions/{subscription_id}/change")
async def preview_change(customer_id: str, subscription_id: str, request: Request, sandbox: SandboxDep) -> Response:
    """What the chosen plan would cost now or at the next billing date."""
    product_id = request.query_params.get("product_id", "")
    try:
        _own(sandbox, customer_id, subscription_id)
        asked = _change(product_id, "immediately")
        one = changeable(sandbox, subscription_id, asked)
        found = preview(sandbox, one, asked)
    except ApiError as error:
        return _failed(error)
    return render("plan_change.html", customer_id=customer_id, one=one, preview=found, product_id=product_id)


@router.post("/subscriptions/{subscription_id}/change")
async def change_plan(customer_id: str, subscription_id: str, request: Request, sandbox: SandboxDep) -> Response:
    form = await _form(request)
    when = "next_billing_date" if form.get("when") == "next_billing_date" else "immediately"
    try:
        _own(sandbox, customer_id, subscription_id)
        asked = _change(form.get("product_id", ""), cast(Literal["immediately", "next_billing_date"], when))
        with sandbox.store.transaction():
            payment_id = make_change(sandbox, changeable(sandbox, subscription_id, asked), asked)
        if payment_id is not None and payment_of(sandbox, payment_id).status != "succeeded":
            raise ApiError(402, "CARD_DECLINED", "The card was declined: the plan stays as it was")
    except ApiError as error:
        return _failed(error)
    return _back(customer_id)


@router.post("/subscriptions/{subscription_id}/keep-plan")
async def keep_plan(customer_id: str, subscription_id: str, sandbox: SandboxDep) -> Response:
    """Withdraw a scheduled change of the plan."""
    try:
        withdraw_change(sandbox, _own(sandbox, customer_id, subscription_id))
    except ApiError as error:
        return _failed(error)
    return _back(customer_id)


def _change(product_id: str, when: Literal["immediately", "next_billing_date"]) -> ChangePlan:
    return ChangePlan(
        product_id=product_id,
        quantity=1,
        proration_billing_mode=MODE,
        effective_at=when,
        on_payment_failure="prevent_change",
        cancel_scheduled_change_plan=True,
    )


def _own(sandbox: Sandbox, customer_id: str, subscription_id: str) -> SubscriptionRecord:
    """Raises ApiError 404 for another customer's subscription, 400 for one that has ended."""
    one = running(sandbox, subscription_id)
    if one.customer.customer_id != customer_id:
        raise not_found("subscription", subscription_id)
    return one


async def _form(request: Request) -> dict[str, str]:
    return dict(parse_qsl((await request.body()).decode(errors="replace")))


def _failed(error: ApiError) -> HTMLResponse:
    return render("message.html", error.status, title="This cannot be done", text=error.message)


def _back(customer_id: str) -> RedirectResponse:
    return RedirectResponse(f"/portal/{customer_id}", 303)
