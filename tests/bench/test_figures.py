"""The figures of the benchmarks. The benchmarks themselves are run by hand."""

import importlib
from pathlib import Path

import pytest

from tests.bench import figures
from tests.bench.figures import Latency


@pytest.mark.parametrize(
    ("values", "percent", "expected"),
    [
        ([7.0], 50, 7.0),
        ([7.0], 99, 7.0),
        ([3.0, 1.0, 2.0, 4.0], 50, 2.0),
        ([3.0, 1.0, 2.0, 4.0], 51, 3.0),
        ([float(n) for n in range(1, 101)], 99, 99.0),
        ([float(n) for n in range(1, 101)], 99.5, 100.0),
    ],
)
def test_percentile_is_one_of_the_values(values: list[float], percent: float, expected: float) -> None:
    assert figures.percentile(values, percent) == expected


def test_percentile_refuses_no_values() -> None:
    with pytest.raises(AssertionError, match="no values"):
        figures.percentile([], 50)


def test_middle_takes_the_median_of_each_percentile() -> None:
    assert figures.middle([Latency(1, 9), Latency(3, 7), Latency(2, 8)]) == Latency(2, 8)


@pytest.mark.parametrize(
    ("row", "is_reached"),
    [
        (figures.at_most("x", 2.0, 2), True),
        (figures.at_most("x", 2.0001, 2), False),
        (figures.at_least("x", 3.0, 3), True),
        (figures.at_least("x", 2.9999, 3), False),
    ],
)
def test_target_is_reached_at_its_limit(row: figures.Row, is_reached: bool) -> None:
    assert row.is_reached is is_reached
    assert figures.verdicts([row]).splitlines()[-1].endswith("| yes |" if is_reached else "| **no** |")


def test_put_replaces_its_section_only(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A\n<!-- one: begin -->\nold\n<!-- one: end -->\nkept\n<!-- two: begin -->\n<!-- two: end -->\n")
    figures.put("one", "new\n", page)
    figures.put("one", "newer\n", page)
    assert page.read_text() == (
        "# A\n<!-- one: begin -->\nnewer\n<!-- one: end -->\nkept\n<!-- two: begin -->\n<!-- two: end -->\n"
    )


def test_put_refuses_a_page_without_the_section(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A\n")
    with pytest.raises(ValueError, match="needs the lines"):
        figures.put("one", "new", page)
    assert page.read_text() == "# A\n"


@pytest.mark.parametrize("name", ["gateway", "ledger", "token_path"])
def test_benchmark_has_a_section_and_names_its_command(name: str) -> None:
    module = importlib.import_module(f"tests.bench.{name}")
    assert f"python -m tests.bench.{name}" in (module.__doc__ or "")
    assert f"<!-- {name}: begin -->" in figures.PAGE.read_text()
