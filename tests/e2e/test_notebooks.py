"""The notebooks run from top to bottom on a running farebox."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.support.stack import Stack

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


def outputs_of(notebook: Path) -> list[nbformat.NotebookNode]:
    """Run a notebook in a kernel with this process's environment; returns the outputs of its cells."""
    read = nbformat.read(notebook, as_version=4)
    NotebookClient(read, timeout=240, kernel_name="python3").execute()
    return [output for cell in read.cells if cell.cell_type == "code" for output in cell.outputs]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::RuntimeWarning")
def test_tour_runs(stack: Stack, repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAREBOX_HOME", str(stack.home))
    outputs = outputs_of(repo / "notebooks" / "01_tour.ipynb")
    assert any("image/png" in output.get("data", {}) for output in outputs), "the plot is drawn"
    assert any("as the ledger" in output.get("text", "") for output in outputs)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::RuntimeWarning")
def test_adapter_notebook_trains_deploys_and_reports(
    stack: Stack, config: Path, repo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The notebook itself asserts that the adapter has its style and that receipts, balance and report agree."""
    monkeypatch.setenv("FAREBOX_HOME", str(stack.home))
    monkeypatch.setenv("FAREBOX_CONFIG", str(config))
    outputs = outputs_of(repo / "notebooks" / "03_deploy_adapter.ipynb")
    said = [output.get("text", "") for output in outputs]
    assert any("butler" in text and "revenue" in text for text in said), "the report names the adapter"
    assert stack.cli("status", check=False).returncode == 0
    assert [model["id"] for model in stack.admin("catalogue").json()["models"]][1:] == ["pirate", "yaml", "support"]
