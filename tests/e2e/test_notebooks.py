"""The notebooks run from top to bottom on a running farebox."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.support.stack import Stack

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


def outputs_of(notebook: Path) -> list[nbformat.NotebookNode]:
    """Run it whole, in a kernel that has this process's environment; what its cells showed."""
    read = nbformat.read(notebook, as_version=4)
    NotebookClient(read, timeout=240, kernel_name="python3").execute()
    return [output for cell in read.cells if cell.cell_type == "code" for output in cell.outputs]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::RuntimeWarning")
def test_the_tour_runs_and_its_sums_agree(stack: Stack, repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAREBOX_HOME", str(stack.home))
    outputs = outputs_of(repo / "notebooks" / "01_tour.ipynb")
    assert any("image/png" in output.get("data", {}) for output in outputs), "the plot is drawn"
    assert any("as the ledger" in output.get("text", "") for output in outputs)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::RuntimeWarning")
def test_an_adapter_is_trained_deployed_and_earns(
    stack: Stack, config: Path, repo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The notebook asserts by itself that the manner carried over and that receipts, balance and report agree."""
    monkeypatch.setenv("FAREBOX_HOME", str(stack.home))
    monkeypatch.setenv("FAREBOX_CONFIG", str(config))
    outputs = outputs_of(repo / "notebooks" / "03_deploy_adapter.ipynb")
    said = [output.get("text", "") for output in outputs]
    assert any("butler" in text and "revenue" in text for text in said), "the report names the adapter"
    assert stack.cli("status", check=False).returncode == 0
    assert [model["id"] for model in stack.admin("catalogue").json()["models"]][1:] == ["pirate", "yaml", "support"]
