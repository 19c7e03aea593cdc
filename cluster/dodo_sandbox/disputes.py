"""Disputes of payments by the buyer's bank. Amounts are cents, as text.

Dodo's API only reads them. The control routes open and end them, as banks do.
"""

from datetime import datetime
from typing import Annotated, ClassVar, Literal

from fastapi import APIRouter, Query
from pydantic import Field

from cluster.dodo_sandbox.customers import CustomerLimitedDetails
from cluster.dodo_sandbox.endpoints import announce
from cluster.dodo_sandbox.errors import bad_request, not_found
from cluster.dodo_sandbox.payments import payment_of
from cluster.dodo_sandbox.state import Sandbox, SandboxDep
from cluster.dodo_sandbox.wire import BRAND_ID, BUSINESS_ID, Page, Paging, Resource, UtcTime, Wire, new_id

router = APIRouter()

Ending = Literal["expired", "accepted", "cancelled", "challenged", "won", "lost"]
ENDED = ("dispute_expired", "dispute_accepted", "dispute_cancelled", "dispute_won", "dispute_lost")


class DisputeSummary(Wire):
    amount: str
    business_id: str = BUSINESS_ID
    created_at: datetime
    currency: str
    dispute_id: str
    dispute_stage: Literal["pre_dispute", "dispute", "pre_arbitration"] = "dispute"
    dispute_status: str = "dispute_opened"
    payment_id: str
    payment_provider: str = "dodo"
    is_resolved_by_rdr: bool | None = None
    """Whether Rapid Dispute Resolution of the card network ended it."""


class Dispute(DisputeSummary):
    brand_id: str = BRAND_ID
    customer: CustomerLimitedDetails
    reason: str | None = None
    remarks: str | None = None


class DisputeRecord(Dispute, Resource):
    kind: ClassVar[str] = "dispute"

    @property
    def key(self) -> str:
        return self.dispute_id

    @property
    def owner(self) -> str:
        return self.customer.customer_id


class OpenDispute(Wire):
    """The disputed amount in cents; all of the payment by default."""

    amount: Annotated[int, Field(gt=0)] | None = None
    reason: str | None = None
    is_resolved_by_rdr: bool | None = None


class DisputeFilter(Paging):
    customer_id: str | None = None
    dispute_status: str | None = None
    dispute_stage: str | None = None
    created_at_gte: UtcTime | None = None
    created_at_lte: UtcTime | None = None


def open_dispute(sandbox: Sandbox, payment_id: str, asked: OpenDispute) -> DisputeRecord:
    """Raises ApiError 400 if the payment did not succeed, or was less."""
    payment, now = payment_of(sandbox, payment_id), sandbox.clock.now()
    amount = payment.total_amount if asked.amount is None else asked.amount
    if payment.status != "succeeded" or amount > payment.total_amount:
        raise bad_request("A dispute is about at most what was paid", "INVALID_DISPUTE")
    made = DisputeRecord(
        amount=str(amount), created_at=now, currency=payment.currency, dispute_id=new_id("dp"),
        payment_id=payment_id, customer=payment.customer, reason=asked.reason,
        is_resolved_by_rdr=asked.is_resolved_by_rdr,
    )  # fmt: skip
    with sandbox.store.transaction():
        sandbox.store.put(made)
        announce(sandbox, "dispute.opened", "dispute", made, now)
    return made


def end_dispute(sandbox: Sandbox, dispute_id: str, ending: Ending) -> DisputeRecord:
    """Raises ApiError 404 for an unknown id, 400 for a dispute that has ended."""
    before = dispute_of(sandbox, dispute_id)
    if before.dispute_status in ENDED:
        raise bad_request(f"The dispute is {before.dispute_status}", "DISPUTE_ENDED")
    after = before.model_copy(update={"dispute_status": f"dispute_{ending}"})
    with sandbox.store.transaction():
        sandbox.store.put(after)
        announce(sandbox, f"dispute.{ending}", "dispute", after, sandbox.clock.now())
    return after


def dispute_of(sandbox: Sandbox, dispute_id: str) -> DisputeRecord:
    """Raises ApiError 404 for an unknown id."""
    found = sandbox.store.get(DisputeRecord, dispute_id)
    if found is None:
        raise not_found("dispute", dispute_id)
    return found


@router.get("/disputes")
async def list_disputes(filters: Annotated[DisputeFilter, Query()], sandbox: SandboxDep) -> Page[DisputeSummary]:
    return filters.of(
        [
            one
            for one in sandbox.store.find(DisputeRecord, filters.customer_id)
            if filters.dispute_status in (None, one.dispute_status)
            and filters.dispute_stage in (None, one.dispute_stage)
            and (filters.created_at_gte is None or one.created_at >= filters.created_at_gte)
            and (filters.created_at_lte is None or one.created_at <= filters.created_at_lte)
        ]
    )


@router.get("/disputes/{dispute_id}")
async def retrieve_dispute(dispute_id: str, sandbox: SandboxDep) -> Dispute:
    return dispute_of(sandbox, dispute_id)
