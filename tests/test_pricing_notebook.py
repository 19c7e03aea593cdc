"""The pricing notebook runs from top to bottom on a store of its own, and says what it promises to say."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

PLOTS = 5


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::RuntimeWarning")
def test_the_pricing_notebook_goes_from_usage_to_prices(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(repo))
    notebook = nbformat.read(repo / "notebooks" / "02_pricing.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "it is kept without outputs"
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == PLOTS
    said = "".join(output.get("text", "") for output in outputs)
    assert "accounts and records agree to the nano" in said
    assert "raised brings" in said
    (cheap,) = [line for line in said.splitlines() if "below cost" in line]
    assert cheap.startswith("banter")
