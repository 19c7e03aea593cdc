"""``farebox dodo verify``: the sandbox behaves as expected, and differences are named."""

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from billing.dodo.settings import DodoSettings
from cluster.cli.dodo import contract_findings
from cluster.cli.main import app
from cluster.dodo_sandbox.server import SandboxServer

pytestmark = pytest.mark.slow

KEY = "dodo_test_key"


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FAREBOX_DODO_ENVIRONMENT", "DODO_PAYMENTS_BASE_URL", "DODO_PAYMENTS_API_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def sandbox(tmp_path: Path) -> Iterator[SandboxServer]:
    with SandboxServer(tmp_path / "dodo", KEY) as server:
        yield server


async def control(sandbox: SandboxServer, path: str, /, **body: object) -> None:
    async with httpx.AsyncClient() as client:
        (await client.post(f"{sandbox.url}/_sandbox/{path}", json=body)).raise_for_status()


def test_sandbox_behaves_as_expected() -> None:
    shown = CliRunner().invoke(app, ["dodo", "verify", "--json"])
    assert shown.exit_code == 0, shown.output
    findings = json.loads(shown.output)
    assert len(findings) == 15
    assert all(one["held"] for one in findings), findings


async def test_verify_twice_leaves_no_endpoint(sandbox: SandboxServer) -> None:
    for _ in range(2):
        findings = await contract_findings(DodoSettings(KEY, base_url=sandbox.url))
        assert all(one.has_held for one in findings), findings
    async with httpx.AsyncClient(headers={"Authorization": f"Bearer {KEY}"}) as merchant:
        assert (await merchant.get(f"{sandbox.url}/webhooks")).json()["data"] == []


@pytest.mark.parametrize(
    ("path", "kind", "differing"),
    [
        ("/webhooks", "status:500", ["a webhook endpoint"]),
        ("/payments", "status:403", ["an unknown payment"]),
        ("/checkouts", "garbage", ["a checkout takes", "a checkout of an unknown"]),
        ("/payments", "drop_before", ["an unknown payment"]),
    ],
)
async def test_verify_names_what_differs(sandbox: SandboxServer, path: str, kind: str, differing: list[str]) -> None:
    await control(sandbox, "faults", path=path, kinds=[kind])
    findings = await contract_findings(DodoSettings(KEY, base_url=sandbox.url))
    assert len(findings) == 15
    named = [one.expectation for one in findings if not one.has_held]
    assert len(named) == len(differing)
    assert all(name.startswith(begin) for name, begin in zip(named, differing, strict=True))


async def test_verify_finds_a_wrong_clock(sandbox: SandboxServer) -> None:
    await control(sandbox, "clock", advance_s=600)
    findings = await contract_findings(DodoSettings(KEY, base_url=sandbox.url))
    named = [one.expectation for one in findings if not one.has_held]
    assert named == ["an event of 61 minutes ago is refused, one of 55 minutes ago is taken"]


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"FAREBOX_DODO_ENVIRONMENT": "live_mode", "DODO_PAYMENTS_API_KEY": "dodo_live_x"}, "refuses live_mode"),
        ({"FAREBOX_DODO_ENVIRONMENT": "test_mode"}, "DODO_PAYMENTS_API_KEY is not set"),
        ({"FAREBOX_DODO_ENVIRONMENT": "prod", "DODO_PAYMENTS_API_KEY": "x"}, "set it to sandbox"),
    ],
)
def test_verify_refuses_live_mode_and_missing_key(
    environment: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    shown = CliRunner().invoke(app, ["dodo", "verify"])
    assert shown.exit_code == 1
    assert said in " ".join(shown.output.split())
