"""Rules that ruff, mypy and import-linter cannot hold: money is never a float, and nothing is left unfinished."""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
MONEY = re.compile(r"nanos|usd|price|charge|cost|balance", re.IGNORECASE)
"""What an expression of money has in its names."""
DIVISION = ROOT / "billing" / "money.py"
"""The only module that may divide money."""


def money_faults(path: Path) -> Iterator[str]:
    """Floats of money, and divisions of money outside of ``DIVISION``."""
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.BinOp(op=ast.Div()) if path != DIVISION and MONEY.search(ast.unparse(node)):
                yield f"{path}:{node.lineno}: {ast.unparse(node)}"
            case ast.AnnAssign(target=name, annotation=type_) if is_float_of_money(ast.unparse(name), type_):
                yield f"{path}:{node.lineno}: {ast.unparse(node)}"
            case ast.arg(arg=name, annotation=ast.expr() as type_) if is_float_of_money(name, type_):
                yield f"{path}:{node.lineno}: {ast.unparse(node)}"
            case ast.Call(func=ast.Name("float")) if MONEY.search(ast.unparse(node)):
                yield f"{path}:{node.lineno}: {ast.unparse(node)}"


def is_float_of_money(name: str, type_: ast.expr) -> bool:
    return bool(MONEY.search(name)) and "float" in ast.unparse(type_)


def test_money_is_no_float_and_divided_in_one_module() -> None:
    paths = sorted((ROOT / "billing").rglob("*.py"))
    assert DIVISION in paths
    assert [fault for path in paths for fault in money_faults(path)] == []


def test_money_module_has_no_float_and_no_true_division() -> None:
    nodes = list(ast.walk(ast.parse(DIVISION.read_text())))
    assert not [node for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, float)]
    assert not [node for node in nodes if isinstance(node, ast.Div)]


def test_no_unfinished_marks() -> None:
    marks = "|".join(("TO" + "DO", "FIX" + "ME", "X" + "XX"))
    done = subprocess.run(
        ["git", "grep", "-nE", rf"\b({marks})\b", "--", "*.py", "*.lua", "*.md", "*.yaml", "Makefile"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout == ""
