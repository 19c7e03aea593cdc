"""The HTML pages: overview and checkout; ``portal`` has the customer's. Every page says that no money is real."""

from datetime import datetime
from pathlib import Path
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from jinja2 import Environment, FileSystemLoader

from cluster.dodo_sandbox.checkout import SessionRecord, cart_lines, currency_of, pay, session_of
from cluster.dodo_sandbox.customers import CustomerRecord
from cluster.dodo_sandbox.errors import ApiError
from cluster.dodo_sandbox.events import sums
from cluster.dodo_sandbox.payments import PaymentRecord, payment_of, taxed
from cluster.dodo_sandbox.state import Sandbox, SandboxDep
from cluster.dodo_sandbox.subscriptions import SubscriptionRecord

ROWS_MAX = 50

router = APIRouter(include_in_schema=False)

_templates = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True, trim_blocks=True, lstrip_blocks=True
)


def money(cents: int, currency: str = "USD") -> str:
    sign = "$" if currency == "USD" else f"{currency} "
    return f"{sign}{cents // 100:,}.{cents % 100:02d}"


def time(value: datetime) -> str:
    return value.strftime("%d %b %Y, %H:%M")


def number(value: int | float) -> str:
    return f"{value:,}"


_templates.filters |= {"money": money, "time": time, "number": number}


def render(name: str, status: int = 200, **values: object) -> HTMLResponse:
    return HTMLResponse(_templates.get_template(name).render(**values), status)


@router.get("/")
async def overview(sandbox: SandboxDep) -> HTMLResponse:
    customers = sandbox.store.find(CustomerRecord)
    return render(
        "index.html",
        now=sandbox.clock.now(),
        customers=customers[:ROWS_MAX],
        customer_count=len(customers),
        names={customer.customer_id: customer.name for customer in customers},
        sums=sums(sandbox.store),
        payments=sandbox.store.find(PaymentRecord)[:ROWS_MAX],
        subscriptions=sandbox.store.find(SubscriptionRecord)[:ROWS_MAX],
        deliveries=sandbox.outbox.recent(ROWS_MAX),
    )


@router.get("/checkout/{session_id}")
async def checkout_page(session_id: str, sandbox: SandboxDep) -> HTMLResponse:
    try:
        session = session_of(sandbox, session_id)
    except ApiError as error:
        return render("message.html", error.status, title="No such checkout", text=error.message)
    payment = payment_of(sandbox, session.payment_id) if session.payment_id else None
    if payment is not None and payment.status == "succeeded":
        return render("paid.html", payment=payment, return_url=session.request.return_url)
    return _cart_page(sandbox, session, payment)


def _cart_page(sandbox: Sandbox, session: SessionRecord, failed: PaymentRecord | None) -> HTMLResponse:
    lines = [taxed(line, sandbox.settings.tax_bps, True) for line in cart_lines(sandbox, session)]
    asked = session.request.customer
    known = sandbox.store.get(CustomerRecord, asked.customer_id) if asked and asked.customer_id else None
    back = session.request.return_url
    return render(
        "checkout.html",
        session=session,
        back=returned(back, failed) if back is not None and failed is not None else None,
        currency=currency_of(sandbox, session),
        lines=lines,
        tax=sum(line.tax for line in lines),
        total=sum(line.amount + line.tax for line in lines),
        email=known.email if known else asked.email if asked else None,
        failed=failed,
    )


@router.post("/checkout/{session_id}/pay")
async def pay_page(session_id: str, request: Request, sandbox: SandboxDep) -> Response:
    """Pay, and show the receipt. A second click shows the same receipt."""
    choice = dict(parse_qsl((await request.body()).decode(errors="replace"))).get("card", "good")
    try:
        payment = pay(sandbox, session_id, declined=choice == "declined")
    except ApiError as error:
        if error.status == 409:
            return RedirectResponse(f"/checkout/{session_id}", 303)
        return render("message.html", error.status, title="This checkout cannot be paid", text=error.message)
    session = session_of(sandbox, session_id)
    if payment.status != "succeeded" or session.request.return_url is None:
        return RedirectResponse(f"/checkout/{session_id}", 303)
    return RedirectResponse(returned(session.request.return_url, payment), 303)


def returned(return_url: str, payment: PaymentRecord) -> str:
    """The merchant's URL with the parameters that Dodo adds: payment id, status and subscription id."""
    added = {"payment_id": payment.payment_id, "status": payment.status}
    if payment.subscription_id is not None:
        added["subscription_id"] = payment.subscription_id
    parts = urlsplit(return_url)
    return urlunsplit(parts._replace(query=urlencode([*parse_qsl(parts.query), *added.items()])))
