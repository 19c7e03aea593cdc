"""The demo's tenants, created over HTTP with purchases in the Dodo sandbox."""

import asyncio
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import uvicorn
import yaml
from deployments.gateway.wiring import build_services
from redis.asyncio import Redis

from billing.catalog import publication
from billing.clock import now_ms
from billing.commerce.sync import sync
from billing.dodo.client import Dodo
from billing.dodo.settings import DodoSettings
from billing.periodic import Intervals, PeriodicTasks, assemble
from billing.store.connection import connect
from cluster.demo import tenants
from cluster.demo.models import Recipe, make_tokenizer
from cluster.demo.tenants import PLANNED, DemoTenantError, create_tenants
from cluster.dodo_sandbox.server import SandboxServer
from deployments.config import FareboxArgs
from deployments.gateway.api.application import make_app
from deployments.gateway.catalog_holder import CatalogHolder
from deployments.inference.text import Text
from tests.support.scripted import ScriptedLink

pytestmark = pytest.mark.slow

ADMIN_KEY, DODO_KEY = "admin-key-of-the-tests", "dodo_test_key"
SECRET = "whsec_" + "c2VjcmV0" * 4


@dataclass(frozen=True)
class Shop:
    """A gateway, the periodic tasks of billing and the Dodo sandbox."""

    url: str
    sandbox_url: str

    async def account(self, key: str) -> dict[str, object]:
        async with httpx.AsyncClient(base_url=self.url, headers={"authorization": f"Bearer {key}"}) as client:
            account: dict[str, object] = (await client.get("/v1/account")).json()
            return account

    async def payments(self) -> int:
        async with httpx.AsyncClient(base_url=self.sandbox_url) as client:
            reply = await client.get("/payments", headers={"authorization": f"Bearer {DODO_KEY}"})
            return len(reply.json()["items"])


@pytest.fixture
async def shop(redis: Redis, store_url: str, tmp_path: Path, repo: Path) -> AsyncIterator[Shop]:
    listening = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    with SandboxServer(tmp_path / "dodo", DODO_KEY, webhook_secret=SECRET) as sandbox:
        environ = {
            "FAREBOX_ADMIN_KEY": ADMIN_KEY,
            "FAREBOX_PUBLIC_URL": url,
            "DODO_PAYMENTS_API_KEY": DODO_KEY,
            "DODO_PAYMENTS_WEBHOOK_KEY": SECRET,
            "DODO_PAYMENTS_BASE_URL": sandbox.url,
        }
        settings, catalog_holder, store = DodoSettings.from_env(environ), CatalogHolder(), await connect(store_url)
        raw = yaml.safe_load((repo / "serve_config.yaml").read_text())
        app, _ = raw["applications"]
        catalog = catalog_holder.put(app["deployments"][0]["user_config"])
        make_tokenizer(Recipe()).save_pretrained(tmp_path / "base")
        args = FareboxArgs.model_validate(app["args"] | {"spool_dir": str(tmp_path / "spool")})
        services = build_services(args, Text(tmp_path / "base"), store, ScriptedLink(), catalog_holder, environ, "gw")
        dodo = Dodo(settings)
        await publication.publish(store, catalog, "gw", now_ms())
        await sync(dodo, store, catalog, f"{url}/webhooks/dodo")

        async def open_parts():
            return assemble(await connect(store_url), settings, 10_000)

        periodic_tasks = PeriodicTasks(open_parts, Intervals(customers_s=0.1))
        server = uvicorn.Server(uvicorn.Config(make_app(services), log_level="error", lifespan="off"))
        serving = asyncio.create_task(server.serve(sockets=[listening]))
        services.gateway.start()
        periodic_tasks.start()
        yield Shop(url, sandbox.url)
        await periodic_tasks.stop()
        server.should_exit = True
        await serving
        await services.gateway.stop()
        for client in (dodo, services.dodo):
            await client.close()
        await store.aclose()


async def test_tenants_have_their_plans_and_credit(shop: Shop) -> None:
    made = await create_tenants(shop.url, ADMIN_KEY, shop.sandbox_url)
    assert {name: tenant.plan for name, tenant in made.items()} == {
        "free": "free",
        "prepaid": "prepaid",
        "payg": "payg",
        "pro": "pro",
        "empty": "prepaid",
    }
    assert len({tenant.dodo_customer_id for tenant in made.values()} - {""}) == 5
    accounts = {name: await shop.account(tenant.api_key) for name, tenant in made.items()}
    assert accounts["free"]["balance_usd"] == "1.000000"
    assert accounts["prepaid"]["balance_usd"] == "5.000000"
    assert accounts["payg"]["overage_cap_usd"] == "25.000000"
    assert accounts["pro"]["overage_cap_usd"] == "50.000000"
    assert accounts["empty"]["balance_usd"] == "0.000000"
    assert accounts["empty"]["packs"] == []


async def test_second_run_changes_nothing(shop: Shop) -> None:
    first = await create_tenants(shop.url, ADMIN_KEY, shop.sandbox_url)
    paid = await shop.payments()
    keys = {name: tenant.api_key for name, tenant in first.items()}
    assert await create_tenants(shop.url, ADMIN_KEY, shop.sandbox_url, keys) == first
    assert await shop.payments() == paid


async def test_lost_key_is_replaced(shop: Shop) -> None:
    first = await create_tenants(shop.url, ADMIN_KEY, shop.sandbox_url)
    second = await create_tenants(shop.url, ADMIN_KEY, shop.sandbox_url, {"free": "fbx_forged"})
    assert {first[name].api_key for name in first}.isdisjoint(second[name].api_key for name in second)
    assert (await shop.account(second["free"].api_key))["tenant"] == "free"
    await asyncio.sleep(1.1)  # gateways cache a key for a second
    assert "error" in await shop.account(first["free"].api_key)


async def test_wrong_admin_key(shop: Shop) -> None:
    with pytest.raises(DemoTenantError, match=r"(GET|POST) .*/admin/tenants answered 40[13]"):
        await create_tenants(shop.url, "wrong", shop.sandbox_url)


async def test_unreachable_api() -> None:
    with pytest.raises(DemoTenantError, match=r"127\.0\.0\.1:9/.* does not answer"):
        await create_tenants("http://127.0.0.1:9", ADMIN_KEY, "http://127.0.0.1:9")


async def test_timeout_is_explained(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tenants, "TIMEOUT_S", 0.0)
    with pytest.raises(DemoTenantError, match="was not there after 0 s"):
        await create_tenants(shop.url, ADMIN_KEY, shop.sandbox_url)


def test_plans_are_those_of_the_shipped_file(repo: Path) -> None:
    raw = yaml.safe_load((repo / "serve_config.yaml").read_text())
    sold = raw["applications"][0]["deployments"][0]["user_config"]
    assert {planned.plan for planned in PLANNED} == set(sold["plans"])
    assert {planned.pack for planned in PLANNED} - {""} <= set(sold["packs"])
