"""The workspace of all tests of the check."""

from pathlib import Path

import pytest

from tests.support.configuration import Workspace


@pytest.fixture
def workspace(tmp_path: Path, repo: Path) -> Workspace:
    return Workspace(tmp_path, (repo / "serve_config.yaml").read_text())
