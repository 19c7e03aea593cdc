"""The merchant's ledger and its payouts: what Dodo took in, kept and paid out, read with Dodo's SDK."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import sandbox_world
from tests.support.sandbox_world import World


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with sandbox_world.world(tmp_path / "dodo") as running:
        yield running


def lines(world: World, **filters: object) -> list[tuple[str, int]]:
    """The oldest first, what is taken below zero."""
    found = world.dodo.balances.retrieve_ledger(page_size=100, **filters).items  # type: ignore[arg-type]
    signed = [(one.event_type, one.amount if one.is_credit else -one.amount) for one in reversed(found)]
    return list(signed)


def test_payment_refund_and_dispute_write_their_lines(world: World) -> None:
    """A pack of $5.00 with 19 % tax: $5.95, of which Dodo keeps 95 cents of tax and 4 % + 40 cents."""
    world.control("settings", tax_bps=1900, payment_fee_bps=400, payment_fee_cents=40, dispute_fee_cents=1500)
    customer = world.customer()
    paid = str(world.buy(customer, world.pack())["payment_id"])
    assert lines(world) == [("payment", 595), ("tax", -95), ("payment_fees", -64)]
    world.dodo.refunds.create(payment_id=paid)
    assert lines(world)[3:] == [("refund", -595), ("tax_reversal", 95)]
    other = str(world.buy(customer, world.pack())["payment_id"])
    dispute = world.control(f"disputes/{other}", amount=119).json()["dispute_id"]
    assert lines(world, reference_object_id=dispute) == [
        ("dispute", -119),
        ("tax_reversal", 19),
        ("dispute_fees", -1500),
    ]
    world.control(f"disputes/{dispute}/won")
    assert lines(world, reference_object_id=dispute)[3:] == [("dispute_reversal", 119), ("tax", -19)]
    balances = world.dodo.balances.retrieve_ledger(page_size=100).items
    assert [one.after_balance for one in balances[1:]] == [one.before_balance for one in balances[:-1]]


def test_declined_payment_writes_no_line(world: World) -> None:
    world.control(f"pay/{world.session(world.customer(), world.pack())}", decline=True)
    assert lines(world) == []


def test_payout_pays_the_balance_less_its_fee(world: World) -> None:
    world.control("settings", payout_fee_cents=30)
    world.buy(world.customer(), world.pack())
    world.control("payouts")
    [payout] = world.dodo.payouts.list().items
    assert (payout.amount, payout.fee, payout.status, payout.currency) == (470, 30, "success", "USD")
    assert lines(world)[1:] == [("payout", -470), ("payout_fees", -30)]
    assert world.http.post("/_sandbox/payouts").status_code == 400


@pytest.mark.parametrize(("kind", "count"), [("payment", 1), ("tax", 0)])
def test_ledger_is_filtered_by_its_kind(world: World, kind: str, count: int) -> None:
    world.buy(world.customer(), world.pack())
    assert len(lines(world, event_type=kind)) == count
