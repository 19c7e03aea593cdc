"""Batched LoRA on a CPU gives each row the product of its own slot, however the rows are spread over the slots."""

import pytest
import torch

from deployments.inference.native.lora import RowPlan, expand, shrink

SLOTS, RANK, MEMBERS, WIDTH, OUT = 7, 16, 3, 24, 40
SPREADS = {
    "one row each": dict.fromkeys(range(SLOTS), 1),
    "some rows each": dict.fromkeys(range(2, 6), 3),
    "one slot": {4: 5},
    "nearly even": {0: 2, 1: 3, 2: 2, 3: 3},
    "a gap": {1: 2, 2: 2, 4: 2},
    "far apart": {0: 1, 6: 1},
    "one long": {0: 1, 1: 1, 2: 40, 3: 1},
}


@pytest.mark.parametrize("rank", [RANK, 8])
@pytest.mark.parametrize("spread", SPREADS)
def test_each_row_gets_the_product_of_its_slot(spread: str, rank: int) -> None:
    torch.manual_seed(0)
    rows_by_slot = SPREADS[spread]
    rows = sum(rows_by_slot.values())
    a = torch.randn(SLOTS, RANK, MEMBERS, WIDTH)
    b = torch.randn(SLOTS, RANK, OUT)
    x, base = torch.randn(rows + 4, WIDTH), torch.randn(rows + 4, OUT)
    plan = RowPlan.of(rows_by_slot, x.device)
    shrunk = shrink(x, a[:, :rank], plan)
    owners = [slot for slot in sorted(rows_by_slot) for _ in range(rows_by_slot[slot])]
    for member in range(MEMBERS):
        y = base.clone()
        expand(y, shrunk[:, :rank, member], b[:, :rank], plan)
        expected = base.clone()
        for row, slot in enumerate(owners):
            expected[row] += x[row] @ a[slot, :rank, member].T @ b[slot, :rank]
        torch.testing.assert_close(y, expected, atol=1e-3, rtol=1e-4)
        assert torch.equal(y[rows:], base[rows:]), "rows of the base model are not touched"


def test_slots_padded_up_to_max_padding() -> None:
    cpu = torch.device("cpu")
    assert RowPlan.of(SPREADS["one row each"], cpu).gather is None
    assert RowPlan.of(SPREADS["nearly even"], cpu).per_slot == 3
    assert RowPlan.of(SPREADS["one long"], cpu).per_slot == 0
    assert RowPlan.of(SPREADS["far apart"], cpu).per_slot == 0
