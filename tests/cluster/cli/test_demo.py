"""``farebox demo year``: shows every step, also on a narrow terminal, and leaves no file behind."""

import tempfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.cli.main import app
from cluster.demo.year import SCRIPT


@pytest.mark.timeout(180)
@pytest.mark.slow
def test_year_shows_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "60")
    shown = CliRunner().invoke(app, ["demo", "year"])
    assert shown.exit_code == 0, shown.output
    assert all(step.what in shown.output for step in SCRIPT)
    assert "no difference" in " ".join(shown.output.split())
    assert list(tmp_path.iterdir()) == []
