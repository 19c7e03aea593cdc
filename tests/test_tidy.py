"""Rules that a machine can judge: money is never a float, a broad except passes on or logs, nothing is unfinished."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("billing", "deployments", "cluster")
DIVIDES = ("billing/money.py",)
"""Where the one division of money stands."""


def python_files(*folders: str) -> list[Path]:
    found = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    assert found
    return found


SOURCES = python_files(*PACKAGES)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", python_files("billing"), ids=name_of)
def test_no_money_is_a_float_or_is_divided_outside_its_one_function(path: Path) -> None:
    money = re.compile(r"nanos|usd|price|charge|cost|balance", re.IGNORECASE)
    for node in ast.walk(ast.parse(path.read_text())):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
            touched = money.search(ast.unparse(node))
            assert not touched or name_of(path) in DIVIDES, f"line {line}: {ast.unparse(node)}"
        if isinstance(node, ast.AnnAssign | ast.arg) and node.annotation is not None:
            name = ast.unparse(node.target) if isinstance(node, ast.AnnAssign) else node.arg
            assert not (money.search(name) and "float" in ast.unparse(node.annotation)), f"line {line}: {name}"
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "float":
            assert not money.search(ast.unparse(node)), f"line {line}: {ast.unparse(node)}"


def test_the_module_of_money_holds_no_float_and_no_true_division() -> None:
    tree = ast.parse((ROOT / "billing" / "money.py").read_text())
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, float)]
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Div)]


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_a_broad_except_passes_on_logs_or_says_why(path: Path) -> None:
    text = path.read_text()
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ExceptHandler):
            caught = "" if node.type is None else ast.unparse(node.type)
            is_passed_on = isinstance(node.body[-1], ast.Raise) or ".exception(" in ast.unparse(node)
            if caught in ("", "Exception", "BaseException") and not is_passed_on:
                assert "#" in lines[node.lineno - 1], f"line {node.lineno}: say why everything is caught"


def test_nothing_is_left_unfinished() -> None:
    marks = "|".join(("TO" + "DO", "FIX" + "ME", "X" + "XX"))
    done = subprocess.run(
        ["git", "grep", "-nE", rf"\b({marks})\b", "--", "*.py", "*.lua", "*.md", "*.yaml", "Makefile"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout == ""
