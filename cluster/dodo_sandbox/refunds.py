"""Refunds of payments or of some of their lines, made at once. Amounts are cents."""

from collections.abc import Sequence
from typing import Annotated, ClassVar

from fastapi import APIRouter, Query
from pydantic import Field

from cluster.dodo_sandbox import balances, entitlements
from cluster.dodo_sandbox.customers import CustomerLimitedDetails
from cluster.dodo_sandbox.endpoints import announce
from cluster.dodo_sandbox.errors import bad_request, not_found
from cluster.dodo_sandbox.payments import Line, RefundSummary, payment_of
from cluster.dodo_sandbox.state import Sandbox, SandboxDep
from cluster.dodo_sandbox.wire import BRAND_ID, LimitedMetadata, Page, Paging, Resource, UtcTime, Wire, new_id

router = APIRouter()


class Refund(RefundSummary):
    brand_id: str = BRAND_ID
    customer: CustomerLimitedDetails
    metadata: LimitedMetadata = Field(default_factory=dict)


class RefundRecord(Refund, Resource):
    kind: ClassVar[str] = "refund"

    @property
    def key(self) -> str:
        return self.refund_id

    @property
    def owner(self) -> str:
        return self.customer.customer_id


class RefundItem(Wire):
    item_id: str
    amount: Annotated[int, Field(gt=0)] | None = None


class CreateRefund(Wire):
    payment_id: str
    items: list[RefundItem] | None = None
    reason: Annotated[str, Field(max_length=3000)] | None = None
    metadata: LimitedMetadata = Field(default_factory=dict)


class RefundFilter(Paging):
    customer_id: str | None = None
    status: str | None = None
    created_at_gte: UtcTime | None = None
    created_at_lte: UtcTime | None = None


def refund(sandbox: Sandbox, request: CreateRefund) -> RefundRecord:
    """Refund what is left of a payment or of the given lines. Raises ApiError 400 for more than that."""
    payment, now = payment_of(sandbox, request.payment_id), sandbox.clock.now()
    if payment.status != "succeeded":
        raise bad_request("Only a succeeded payment can be refunded", "PAYMENT_NOT_SUCCEEDED")
    lines, amount = after_refund(payment.lines, request.items)
    if amount == 0:
        raise bad_request("Nothing of this payment is left to refund", "REFUND_AMOUNT_EXCEEDED")
    made = RefundRecord(
        created_at=now, is_partial=amount < payment.total_amount, payment_id=payment.payment_id,
        refund_id=new_id("ref"), amount=amount, currency=payment.currency, reason=request.reason,
        customer=payment.customer, metadata=request.metadata,
    )  # fmt: skip
    left = sum(one.refundable_amount for one in lines)
    summary = RefundSummary(**{name: getattr(made, name) for name in RefundSummary.model_fields})
    change = {"lines": lines, "refunds": [*payment.refunds, summary], "updated_at": now}
    with sandbox.store.transaction():
        sandbox.store.put(made)
        sandbox.store.put(payment.model_copy(update=change | {"refund_status": "partial" if left else "full"}))
        paid = (payment.total_amount, payment.tax or 0)
        balances.refunded(sandbox, made.refund_id, made.currency, amount, paid, now)
        announce(sandbox, "refund.succeeded", "refund", made, now)
        if not left:
            entitlements.revoke_all(sandbox, "refunded", now, payment_id=payment.payment_id)
    return made


def after_refund(lines: Sequence[Line], items: Sequence[RefundItem] | None) -> tuple[list[Line], int]:
    """The lines after the refund, and its amount."""
    wanted = {item.item_id: item.amount for item in items} if items is not None else None
    if wanted is not None and (unknown := set(wanted) - {one.items_id for one in lines}):
        raise bad_request(f"Unknown line item {min(unknown)}", "INVALID_LINE_ITEM")
    result, total = [], 0
    for one in lines:
        named = wanted is None or one.items_id in wanted
        asked = (wanted or {}).get(one.items_id)
        taken = 0 if not named else one.refundable_amount if asked is None else asked
        if taken > one.refundable_amount:
            raise bad_request(f"{taken} is more than is left of {one.items_id}", "REFUND_AMOUNT_EXCEEDED")
        result.append(one.model_copy(update={"refundable_amount": one.refundable_amount - taken}))
        total += taken
    return result, total


@router.post("/refunds")
async def create_refund(request: CreateRefund, sandbox: SandboxDep) -> Refund:
    return refund(sandbox, request)


@router.get("/refunds")
async def list_refunds(filters: Annotated[RefundFilter, Query()], sandbox: SandboxDep) -> Page[RefundSummary]:
    return filters.of(
        [
            one
            for one in sandbox.store.find(RefundRecord, filters.customer_id)
            if filters.status in (None, one.status)
            and (filters.created_at_gte is None or one.created_at >= filters.created_at_gte)
            and (filters.created_at_lte is None or one.created_at <= filters.created_at_lte)
        ]
    )


@router.get("/refunds/{refund_id}")
async def retrieve_refund(refund_id: str, sandbox: SandboxDep) -> Refund:
    made = sandbox.store.get(RefundRecord, refund_id)
    if made is None:
        raise not_found("refund", refund_id)
    return made
