"""An arm that offers what is not there, or what everybody is offered, is found before anything is deployed."""

import pytest

from tests.cluster.checking.test_check import Desk, desk

__all__ = ["desk"]
PRICING = """          pricing:
            experiments:
              - id: x
                arms: [{id: a}, {id: b, packs: [PACK]}]

          default_plan:"""


@pytest.mark.parametrize(
    ("pack", "is_right", "problem"),
    [
        ("smal", False, "'smal' is not one of the packs: did you mean `small`?"),
        ("small", True, "'small' is not `visibility: hidden`"),
    ],
)
def test_an_arm_offers_hidden_packs_that_are_there(desk: Desk, pack: str, is_right: bool, problem: str) -> None:
    desk.edit("          default_plan:", PRICING.replace("PACK", pack))
    report = desk.check()
    [finding] = report.findings
    assert report.is_right is is_right
    assert problem in finding.problem
    assert finding.line == desk.line_of("arms:")


def test_an_arm_may_offer_a_hidden_pack(desk: Desk) -> None:
    desk.edit("          default_plan:", PRICING.replace("PACK", "large"))
    desk.edit('price: "50.00"\n', 'price: "50.00"\n              visibility: hidden\n')
    assert desk.check().findings == ()
