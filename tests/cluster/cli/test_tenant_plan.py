"""``farebox tenants plan``: a plan set here, or a subscription changed at Dodo after it was asked."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from click.testing import Result
from typer.testing import CliRunner

from billing.catalog import publication
from billing.catalog.catalog import Catalog
from billing.commerce.context import Commerce
from billing.commerce.products import Products, sold
from billing.commerce.subscriptions import Subscriptions
from billing.commerce.sync import sync
from billing.dodo.client import Dodo
from billing.dodo.settings import DodoSettings
from billing.ledger.ledger import Ledger
from billing.store.connection import connect
from billing.tenants.directory import Tenants
from billing.tenants.tenant import Tenant
from billing.usage import TenantId
from cluster.cli.main import app
from cluster.dodo_sandbox.server import SandboxServer
from cluster.local.settings import Settings
from cluster.local.state import Home
from tests.support.cli import write_healthy_run

runner = CliRunner()
TEAM = {"kind": "subscription", "monthly_price": "50", "allowance": {"usd": "70"}, "credit_limit": "5"}
PRO = {"kind": "subscription", "monthly_price": "20", "allowance": {"usd": "25"}, "credit_limit": "5"}
CATALOG = Catalog.model_validate(
    {
        "models": [{"id": "pirate", "price": {"input_per_1m": "1"}}],
        "plans": {"prepaid": {"kind": "prepaid"}, "pro": PRO, "team": TEAM},
        "default_plan": "prepaid",
    }
)


@pytest.fixture
def sandbox(store_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SandboxServer]:
    """A farebox whose tenant ``paying`` has a subscription to pro, and ``idle`` none."""
    monkeypatch.setenv("FAREBOX_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "160")
    with SandboxServer(tmp_path / "dodo", Home.open(Settings.from_env()).secrets().dodo_api_key) as server:
        write_healthy_run(store_url, server.url)
        asyncio.run(_subscribe(store_url, server))
        yield server


async def _subscribe(store_url: str, server: SandboxServer) -> None:
    redis, dodo = await connect(store_url), Dodo(DodoSettings(server.api_key, base_url=server.url))
    await redis.flushall()
    await publication.publish(redis, CATALOG, "gateway-1", 0)
    await sync(dodo, redis, CATALOG)
    tenants = Tenants(redis)
    for name in ("paying", "idle"):
        tenant = await tenants.create(Tenant(id=TenantId(name), email=f"{name}@example.com", plan="prepaid"))
        tenant = await tenants.set_customer(tenant.id, await dodo.create_customer(tenant))
        if name == "paying":
            pro = next(terms for terms in sold(CATALOG) if terms.plain_name == "pro")
            url = await dodo.checkout(tenant, await Products(redis).id_for(pro), {}, "http://127.0.0.1/")
            async with httpx.AsyncClient(base_url=server.url, trust_env=False) as bank:
                paid = (await bank.post(f"/_sandbox/pay/{url.rpartition('/')[2]}")).json()
            commerce = Commerce(redis, dodo, Ledger(redis), tenants, lambda: publication.current(redis))
            await Subscriptions(commerce).refresh(paid["subscription_id"])
    await dodo.close()
    await redis.aclose()


def call(*words: str, answer: str = "") -> Result:
    return runner.invoke(app, ["tenants", *words], input=answer)


def plan_of(name: str) -> str:
    return str(json.loads(call("show", name, "--json").stdout)["plan"])


def test_plan_without_a_subscription_is_set_here(sandbox: SandboxServer) -> None:
    assert "nothing is charged" in call("plan", "idle", "team", "--preview").output
    assert plan_of("idle") == "prepaid"
    done = call("plan", "idle", "team")
    assert (done.exit_code, done.output) == (0, "idle is on plan team\n")
    assert plan_of("idle") == "team"


def test_subscription_is_changed_at_dodo_once_confirmed(sandbox: SandboxServer) -> None:
    shown = call("plan", "paying", "team", "--preview")
    assert "$30.0" in shown.output, "$50 less what is left of the month's $20"
    assert call("plan", "paying", "team", answer="n\n").exit_code == 1
    assert plan_of("paying") == "pro"
    done = call("plan", "paying", "team", answer="y\n")
    assert done.exit_code == 0, done.output
    assert "changed: paying is on team from" in done.output
    assert plan_of("paying") == "team"


def test_downgrade_is_scheduled(sandbox: SandboxServer) -> None:
    assert call("plan", "paying", "team", "--yes").exit_code == 0
    done = call("plan", "paying", "pro", "--yes", "--json")
    assert json.loads(done.stdout)["state"] == "scheduled"
    assert plan_of("paying") == "team"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("paying", "prepaid", "--yes"), "to leave a plan, cancel"),
        (("paying", "none"), "'none' is not one of the plans prepaid, pro, team"),
        (("nobody", "pro"), "nobody"),
    ],
)
def test_impossible_plan_is_refused(sandbox: SandboxServer, words: tuple[str, ...], message: str) -> None:
    refused = call("plan", *words)
    assert refused.exit_code == 1
    assert message in refused.output
