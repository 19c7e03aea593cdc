"""A broken law cannot look clean, and the page around the table is left alone."""

import importlib
from dataclasses import replace

import pytest

from tests.chaos.__main__ import PAGE, SCENARIOS
from tests.chaos.table import BEGIN, END, Row, markdown, put_between_marks

CLEAN = Row("a kill", 20, 0, 0, 0)


@pytest.mark.parametrize("broken", [{"lost": 1}, {"doubled": 1}, {"drift_nanos": 1}, {"drift_nanos": -1}, {"tries": 0}])
def test_one_of_anything_is_not_clean_and_neither_is_nothing_tried(broken: dict[str, int]) -> None:
    assert CLEAN.is_clean
    assert not replace(CLEAN, **broken).is_clean


def test_a_table_shows_every_row() -> None:
    assert markdown([CLEAN, replace(CLEAN, name="another", tries=1_000)]).splitlines()[2:] == [
        "| a kill   |    20 |    0 |       0 |             0 |",
        "| another  | 1,000 |    0 |       0 |             0 |",
    ]


def test_what_stands_around_the_table_stays() -> None:
    page = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    assert put_between_marks(page, "new\n") == f"before\n{BEGIN}\nnew\n{END}\nafter\n"
    with pytest.raises(ValueError, match="needs the lines"):
        put_between_marks("no marks", "new")


def test_the_page_has_its_marks_and_every_scenario_its_name() -> None:
    assert BEGIN in put_between_marks(PAGE.read_text(), "new")
    names = [importlib.import_module(f"tests.chaos.{module}").NAME for module in SCENARIOS]
    assert len(names) == len(set(names))
