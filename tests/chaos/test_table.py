"""The table of the scenarios."""

import importlib
from dataclasses import replace

import pytest

from tests.chaos.__main__ import PAGE, SCENARIOS
from tests.chaos.table import Row, markdown

CLEAN = Row("a kill", 20, 0, 0, 0)


@pytest.mark.parametrize(
    "broken", [{"lost": 1}, {"doubled": 1}, {"difference_nanos": 1}, {"difference_nanos": -1}, {"tries": 0}]
)
def test_row_with_a_fault_or_without_tries_is_not_clean(broken: dict[str, int]) -> None:
    assert CLEAN.is_clean
    assert not replace(CLEAN, **broken).is_clean


def test_table_has_every_row() -> None:
    assert markdown([CLEAN, replace(CLEAN, name="another", tries=1_000)]).splitlines()[2:] == [
        "| a kill   |    20 |    0 |       0 |                  0 |",
        "| another  | 1,000 |    0 |       0 |                  0 |",
    ]


def test_page_has_the_marks_of_the_table() -> None:
    page = PAGE.read_text()
    assert page.index("<!-- chaos: begin -->") < page.index("<!-- chaos: end -->")


def test_scenarios_have_names_of_their_own() -> None:
    names = [importlib.import_module(f"tests.chaos.{module}").NAME for module in SCENARIOS]
    assert len(names) == len(set(names))
