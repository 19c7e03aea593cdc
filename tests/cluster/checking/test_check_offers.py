"""``farebox check`` of the packs and plans that an experiment's arms offer."""

import pytest

from tests.support.configuration import Workspace

PRICING = """          pricing:
            experiments:
              - id: x
                arms: [{id: a}, {id: b, packs: [PACK]}]

          default_plan:"""


@pytest.mark.parametrize(
    ("pack", "is_valid", "problem"),
    [
        ("smal", False, "'smal' is not one of the packs: did you mean `small`?"),
        ("small", True, "'small' is not `visibility: hidden`"),
    ],
)
def test_pack_of_arm_must_exist_and_be_hidden(workspace: Workspace, pack: str, is_valid: bool, problem: str) -> None:
    workspace.edit("          default_plan:", PRICING.replace("PACK", pack))
    report = workspace.check()
    [finding] = report.findings
    assert report.is_valid is is_valid
    assert problem in finding.problem
    assert finding.line == workspace.line_of("arms:")


def test_hidden_pack_of_arm_is_allowed(workspace: Workspace) -> None:
    workspace.edit("          default_plan:", PRICING.replace("PACK", "large"))
    workspace.edit('price: "50.00"\n', 'price: "50.00"\n              visibility: hidden\n')
    assert workspace.check().findings == ()
