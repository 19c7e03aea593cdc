"""The systemd unit in the documentation starts a killed farebox again, and leaves one that was stopped alone."""

import re
from configparser import ConfigParser
from pathlib import Path

import pytest


@pytest.fixture
def unit(repo: Path) -> str:
    (found,) = re.findall(r"```ini\n(# /etc/systemd/system/farebox\.service\n.*?)```", docs(repo), re.DOTALL)
    return str(found)


def docs(repo: Path) -> str:
    return (repo / "docs" / "operating.md").read_text()


def test_unit_restarts_what_was_killed_for_ever(unit: str) -> None:
    parsed = ConfigParser(interpolation=None)
    parsed.optionxform = str  # type: ignore[assignment,method-assign]
    parsed.read_string(unit)
    service = parsed["Service"]
    assert (service["Restart"], service["KillMode"]) == ("on-failure", "mixed")
    assert parsed["Unit"]["StartLimitIntervalSec"] == "0", "systemd gives up after five deaths otherwise"
    assert service["ExecStart"].split()[1:] == ["up"], "in the foreground: systemd watches the supervisor itself"
