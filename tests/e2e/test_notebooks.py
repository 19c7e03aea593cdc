"""The notebooks run from top to bottom on a running farebox."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.e2e.stack import Stack

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::RuntimeWarning")
def test_the_tour_runs_and_its_sums_agree(stack: Stack, repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAREBOX_HOME", str(stack.home))
    notebook = nbformat.read(repo / "notebooks" / "01_tour.ipynb", as_version=4)
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs), "the plot is drawn"
    assert any("as the ledger" in output.get("text", "") for output in outputs)
