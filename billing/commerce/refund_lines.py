"""What was refunded of each thing in a payment, as its invoice says: Dodo's refunds do not name their lines."""

from collections.abc import Sequence

from billing.commerce.inbox import PurchasedCredit
from billing.dodo.client import Dodo
from billing.dodo.errors import DodoRefused
from billing.dodo.wire import InvoiceLine, Payment


async def refunded_lines(dodo: Dodo, payment: Payment, amount: int | None) -> Sequence[InvoiceLine]:
    """The invoice of a payment that was refunded in part; nothing where it does not account for the refund.

    Raises:
        DodoUnavailable: Dodo could not say.
    """
    if amount is None or amount >= payment.total_amount:
        return ()
    try:
        lines = await dodo.invoice_lines(payment.id)
    except DodoRefused:
        return ()
    return lines if sum(line.refunded for line in lines) >= amount else ()


async def line_of(dodo: Dodo, lines: Sequence[InvoiceLine], credit: PurchasedCredit) -> InvoiceLine | None:
    """The line that a credit was bought by; ``None`` where that is not clear, and for what a person booked.

    Raises:
        DodoUnavailable: Dodo could not say.
    """
    if not lines or credit.tenant:
        return None
    try:
        if credit.is_allowance:
            subscription = await dodo.retrieve_subscription(credit.source.split(":")[1])
            product_id, name = subscription.product_id, subscription.product_name
        else:
            product_id = credit.source.rpartition(":")[2]
            name = (await dodo.retrieve_product(product_id)).name
    except DodoRefused:
        return None
    by_id = [line for line in lines if line.id == product_id]
    found = by_id or [line for line in lines if line.name == name or line.name.startswith(f"{name} ")]
    return found[0] if len(found) == 1 and found[0].total > 0 else None
