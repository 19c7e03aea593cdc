"""Dodo's own ledger of what it owes the merchant, and payouts of it. Amounts are the currency's smallest unit.

Lines are written when money moves, with the fees of that moment's settings. Which lines there are is as in the SDK's
``BalanceLedgerEntry``; how fees are reckoned and rounded is chosen here.
"""

from datetime import datetime
from typing import Annotated, ClassVar, Literal

from fastapi import APIRouter, Query

from cluster.dodo_sandbox.errors import bad_request
from cluster.dodo_sandbox.state import Sandbox, SandboxDep
from cluster.dodo_sandbox.wire import BUSINESS_ID, Cents, Page, Paging, Resource, UtcTime, Wire, new_id

router = APIRouter()
control = APIRouter(prefix="/_sandbox")

EventType = Literal[
    "payment", "tax", "payment_fees", "refund", "tax_reversal", "refund_fees", "dispute", "dispute_reversal",
    "dispute_fees", "payout", "payout_fees",
]  # fmt: skip
BPS = 10_000
USD = "USD"


class BalanceLedgerEntry(Wire):
    id: str
    amount: Cents
    business_id: str = BUSINESS_ID
    created_at: datetime
    currency: str
    event_type: EventType
    is_credit: bool
    usd_equivalent_amount: Cents
    """The same number in every currency: the sandbox exchanges none."""
    after_balance: int
    before_balance: int
    description: str | None = None
    payout_id: str | None = None
    reference_object_id: str | None = None


class LineRecord(BalanceLedgerEntry, Resource):
    """Owned by its currency, which has a balance of its own."""

    kind: ClassVar[str] = "balance_line"

    @property
    def key(self) -> str:
        return self.id

    @property
    def owner(self) -> str:
        return self.currency


class Payout(Wire):
    amount: Cents
    """What reaches the merchant's bank, its fee deducted."""
    business_id: str = BUSINESS_ID
    chargebacks: Cents = 0
    created_at: datetime
    currency: str = USD
    fee: Cents
    payment_method: str = "bank_transfer"
    payout_id: str
    refunds: Cents = 0
    status: Literal["success"] = "success"
    tax: Cents = 0
    updated_at: datetime
    name: str | None = None
    payout_document_url: str | None = None
    remarks: str | None = None


class PayoutRecord(Payout, Resource):
    kind: ClassVar[str] = "payout"

    @property
    def key(self) -> str:
        return self.payout_id


class LedgerFilter(Paging):
    created_at_gte: UtcTime | None = None
    created_at_lte: UtcTime | None = None
    currency: str | None = None
    event_type: str | None = None
    reference_object_id: str | None = None

    def admits(self, line: BalanceLedgerEntry) -> bool:
        return (
            (self.created_at_gte is None or line.created_at >= self.created_at_gte)
            and (self.created_at_lte is None or line.created_at <= self.created_at_lte)
            and self.event_type in (None, line.event_type)
            and self.reference_object_id in (None, line.reference_object_id)
        )


class PayoutFilter(Paging):
    created_at_gte: UtcTime | None = None
    created_at_lte: UtcTime | None = None


def balance_of(sandbox: Sandbox, currency: str) -> int:
    newest = sandbox.store.newest(LineRecord, currency)
    return newest.after_balance if newest else 0


def paid(sandbox: Sandbox, payment_id: str, currency: str, total: int, tax: int, at: datetime) -> None:
    """A payment succeeded: Dodo keeps the tax, which it owes to the state, and its fee."""
    settings = sandbox.settings
    fee = share(total, settings.payment_fee_bps, BPS) + settings.payment_fee_cents if total else 0
    _write(sandbox, "payment", total, currency, payment_id, at)
    _write(sandbox, "tax", -tax, currency, payment_id, at)
    _write(sandbox, "payment_fees", -fee, currency, payment_id, at)


def refunded(
    sandbox: Sandbox, refund_id: str, currency: str, amount: int, payment: tuple[int, int], at: datetime
) -> None:
    """``payment``: total and tax. The refund's share of the tax comes back; the payment's fee does not."""
    _write(sandbox, "refund", -amount, currency, refund_id, at)
    _write(sandbox, "tax_reversal", share(payment[1], amount, payment[0]), currency, refund_id, at)
    _write(sandbox, "refund_fees", -sandbox.settings.refund_fee_cents, currency, refund_id, at)


def disputed(
    sandbox: Sandbox, dispute_id: str, currency: str, amount: int, payment: tuple[int, int], at: datetime
) -> None:
    """A dispute was opened: the bank has its amount, and the share of the tax comes back."""
    _write(sandbox, "dispute", -amount, currency, dispute_id, at)
    _write(sandbox, "tax_reversal", share(payment[1], amount, payment[0]), currency, dispute_id, at)
    _write(sandbox, "dispute_fees", -sandbox.settings.dispute_fee_cents, currency, dispute_id, at)


def dispute_won(
    sandbox: Sandbox, dispute_id: str, currency: str, amount: int, payment: tuple[int, int], at: datetime
) -> None:
    """The amount comes back, without the fee."""
    _write(sandbox, "dispute_reversal", amount, currency, dispute_id, at)
    _write(sandbox, "tax", -share(payment[1], amount, payment[0]), currency, dispute_id, at)


def pay_out(sandbox: Sandbox) -> PayoutRecord:
    """Pay out the whole balance in US dollars. Raises ApiError 400 where it does not cover the payout's fee."""
    fee, now = sandbox.settings.payout_fee_cents, sandbox.clock.now()
    amount = balance_of(sandbox, USD) - fee
    if amount <= 0:
        raise bad_request("There is nothing to pay out", "INSUFFICIENT_BALANCE")
    made = PayoutRecord(payout_id=new_id("pyt"), amount=amount, fee=fee, created_at=now, updated_at=now)
    with sandbox.store.transaction():
        sandbox.store.put(made)
        for kind, cents in (("payout", amount), ("payout_fees", fee)):
            _write(sandbox, kind, -cents, USD, made.payout_id, now, made.payout_id)  # type: ignore[arg-type]
    return made


def share(whole: int, part: int, of: int) -> int:
    """Rounded to the nearest unit, half up."""
    return (2 * whole * part + of) // (2 * of) if of else 0


def _write(
    sandbox: Sandbox,
    event_type: EventType,
    amount: int,
    currency: str,
    reference: str,
    at: datetime,
    payout_id: str | None = None,
) -> None:
    """One line; below zero is taken from the balance. Nothing is no line."""
    if amount == 0:
        return
    before = balance_of(sandbox, currency)
    sandbox.store.put(
        LineRecord(
            id=new_id("bal"), amount=abs(amount), created_at=at, currency=currency, event_type=event_type,
            is_credit=amount > 0, usd_equivalent_amount=abs(amount), before_balance=before,
            after_balance=before + amount, reference_object_id=reference, payout_id=payout_id,
        )
    )  # fmt: skip


@router.get("/balances/ledger")
async def retrieve_ledger(filters: Annotated[LedgerFilter, Query()], sandbox: SandboxDep) -> Page[BalanceLedgerEntry]:
    return filters.of([one for one in sandbox.store.find(LineRecord, filters.currency) if filters.admits(one)])


@router.get("/payouts")
async def list_payouts(filters: Annotated[PayoutFilter, Query()], sandbox: SandboxDep) -> Page[Payout]:
    return filters.of(
        [
            one
            for one in sandbox.store.find(PayoutRecord)
            if (filters.created_at_gte is None or one.created_at >= filters.created_at_gte)
            and (filters.created_at_lte is None or one.created_at <= filters.created_at_lte)
        ]
    )


@control.post("/payouts")
async def create_payout(sandbox: SandboxDep) -> Payout:
    return pay_out(sandbox)
