"""The SDK's traps stay behind the face: environments, pages, two kinds of failure."""

import httpx
import pytest

from billing.dodo.client import PAGE, Dodo, Event
from billing.dodo.errors import DodoMisconfigured, DodoRefused, DodoUnavailable
from billing.dodo.fields import WireError, integer, moment_ms, to_iso
from billing.dodo.settings import DodoSettings
from billing.dodo.wire import DodoSubscription, Payment
from billing.tenants.tenant import Tenant
from billing.usage import TenantId
from tests.support.sandbox_world import ONCE
from tests.support.world import API_KEY, World

KEY = {"DODO_PAYMENTS_API_KEY": "dodo_test_1"}
BASE = {"DODO_PAYMENTS_BASE_URL": "http://127.0.0.1:8010"}


def test_sandbox_is_the_default_environment() -> None:
    assert DodoSettings.from_env(KEY | BASE).environment == "sandbox"
    live = DodoSettings.from_env(KEY | {"FAREBOX_DODO_ENVIRONMENT": "live_mode"})
    assert (live.environment, live.base_url) == ("live_mode", "")


@pytest.mark.parametrize(
    ("environ", "named"),
    [
        (KEY, "DODO_PAYMENTS_BASE_URL"),
        (BASE, "DODO_PAYMENTS_API_KEY"),
        (KEY | BASE | {"FAREBOX_DODO_ENVIRONMENT": "live_mode"}, "forbids DODO_PAYMENTS_BASE_URL"),
        (KEY | {"DODO_PAYMENTS_BASE_URL": "127.0.0.1:8010"}, "write it as http://127.0.0.1:8020"),
        (
            KEY | {"FAREBOX_DODO_ENVIRONMENT": "test_mode", "DODO_PAYMENTS_BASE_URL": "https://live.dodopayments.com"},
            "Dodo's live mode",
        ),
        (KEY | {"FAREBOX_DODO_ENVIRONMENT": "production"}, "FAREBOX_DODO_ENVIRONMENT"),
    ],
)
def test_contradictory_settings_are_refused_by_name(environ: dict[str, str], named: str) -> None:
    with pytest.raises(DodoMisconfigured, match=named):
        DodoSettings.from_env(environ)


@pytest.mark.parametrize(
    ("environment", "host"), [("test_mode", "test.dodopayments.com"), ("live_mode", "live.dodopayments.com")]
)
async def test_each_mode_has_its_host_and_nothing_is_retried(environment: str, host: str) -> None:
    asked: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.url.host)
        return httpx.Response(503)

    client = httpx.AsyncClient(transport=httpx.MockTransport(answer))
    dodo = Dodo(DodoSettings("key", environment=environment), client)  # type: ignore[arg-type]
    with pytest.raises(DodoUnavailable):
        await dodo.ingest([Event("id", "cus", "farebox.usage", 0, {})])
    assert asked == [host]
    await dodo.close()


@pytest.mark.parametrize("environment", ["sandbox", "test_mode"])
async def test_proxy_stands_before_the_sandbox_and_test_mode(environment: str) -> None:
    asked: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(f"{request.url.scheme}://{request.url.netloc.decode()}")
        return httpx.Response(503)

    client = httpx.AsyncClient(transport=httpx.MockTransport(answer))
    dodo = Dodo(DodoSettings.from_env(KEY | BASE | {"FAREBOX_DODO_ENVIRONMENT": environment}), client)
    with pytest.raises(DodoUnavailable):
        await dodo.ingest([Event("id", "cus", "farebox.usage", 0, {})])
    assert asked == [BASE["DODO_PAYMENTS_BASE_URL"]]
    await dodo.close()


async def test_every_page_is_read(world: World) -> None:
    for number in range(PAGE + 20):
        await world.dodo.create_product(f"other:{number}", f"Product {number}", _one_time())
    products = await world.dodo.products()
    assert {f"other:{number}" for number in range(PAGE + 20)} <= {product.tag for product in products}
    assert len({product.id for product in products}) == len(products)


def _one_time() -> object:
    return ONCE | {"price": 100}


async def test_customer_is_found_again_and_never_shared(world: World) -> None:
    one = Tenant(id=TenantId("one"), email="same@example.com", plan="prepaid")
    two = Tenant(id=TenantId("two"), email="same@example.com", plan="prepaid")
    first = await world.dodo.create_customer(one)
    assert await world.dodo.create_customer(one) == first
    assert await world.dodo.create_customer(two) != first


@pytest.mark.parametrize("metadata", [{}, {"farebox_tenant": "other"}])
async def test_customer_without_our_tag_is_refused(metadata: dict[str, str]) -> None:
    """Where Dodo answers a creation with the customer that already has this email."""
    found = {"customer_id": "cus_1", "email": "same@example.com", "name": "Same", "metadata": metadata}

    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, json={"items": [found]} if request.method == "GET" else found)

    client = httpx.AsyncClient(transport=httpx.MockTransport(answer))
    dodo = Dodo(DodoSettings(API_KEY, base_url="http://dodo.test"), client)
    with pytest.raises(DodoRefused, match=metadata.get("farebox_tenant", "no tenant.s")):
        await dodo.create_customer(Tenant(id=TenantId("one"), email="same@example.com", plan="prepaid"))
    await dodo.close()


async def test_lost_reply_makes_no_second_customer(world: World) -> None:
    tenant = Tenant(id=TenantId("one"), email="one@example.com", plan="prepaid")
    rule = {"path": "/customers", "method": "POST", "kinds": ["drop_after"], "count": 1}
    await world.operator.post("/_sandbox/faults", json=rule)
    with pytest.raises(DodoUnavailable):
        await world.dodo.create_customer(tenant)
    found = await world.dodo.create_customer(tenant)
    listed = await world.operator.get("/customers", headers={"Authorization": "Bearer dodo_test_key"})
    assert [customer["customer_id"] for customer in listed.json()["items"]] == [found]


@pytest.mark.parametrize("status", [408, 409, 429, 500, 503])
async def test_transient_status_is_unavailable(world: World, status: int) -> None:
    await world.fault(f"status:{status}", path="/products")
    with pytest.raises(DodoUnavailable):
        await world.dodo.products()


@pytest.mark.parametrize("status", [400, 401, 402, 403, 404, 413, 422])
async def test_permanent_status_is_refused(world: World, status: int) -> None:
    await world.fault(f"status:{status}", path="/products")
    with pytest.raises(DodoRefused) as refused:
        await world.dodo.products()
    assert refused.value.status == status


async def test_retry_after_is_passed_on() -> None:
    transport = httpx.MockTransport(lambda _: httpx.Response(429, headers={"retry-after": "17"}))
    dodo = Dodo(DodoSettings("key", environment="test_mode"), httpx.AsyncClient(transport=transport))
    with pytest.raises(DodoUnavailable) as unavailable:
        await dodo.products()
    assert unavailable.value.retry_after_s == 17
    await dodo.close()


@pytest.mark.parametrize("reply", ["<html>", "[]", "null", '{"items": null}', "{"])
async def test_unreadable_reply_is_unavailable(reply: str) -> None:
    for content_type in ("text/html", "application/json"):
        answer = httpx.Response(200, text=reply, headers={"content-type": content_type})
        transport = httpx.MockTransport(lambda _, answer=answer: answer)
        dodo = Dodo(DodoSettings("key", environment="test_mode"), httpx.AsyncClient(transport=transport))
        for call in (
            dodo.products(),
            dodo.retrieve_payment("pay"),
            dodo.ingest([Event("i", "c", "n", 0, {})]),
            dodo.webhooks() if reply != '{"items": null}' else dodo.meters(),
        ):
            with pytest.raises(DodoUnavailable):
                await call
        await dodo.close()


async def test_event_is_known_or_not(world: World) -> None:
    tenant = await world.tenant("acme")
    await world.dodo.ingest([Event("evt_1", tenant.dodo_customer_id, "farebox.usage", world.clock(), {})])
    assert await world.dodo.has_event("evt_1")
    assert not await world.dodo.has_event("evt_2")


async def test_customer_gets_a_portal_of_its_own(world: World) -> None:
    tenant = await world.tenant("acme")
    assert (await world.dodo.portal(tenant.dodo_customer_id)).startswith("http")


def test_moments_and_numbers_are_read_exactly_or_refused() -> None:
    assert moment_ms({"at": "2026-11-23T10:00:00.123456Z"}, "at") == 1_795_428_000_123
    assert moment_ms({"at": "2026-11-23T11:00:00+01:00"}, "at") == 1_795_428_000_000
    assert moment_ms({}, "at") is None
    assert to_iso(1_795_428_000_123) == "2026-11-23T10:00:00.123Z"
    assert integer({"n": "12345678901234567"}, "n") == 12_345_678_901_234_567
    assert integer({"n": "12.000"}, "n") == 12
    for bad in ("", "x", "1.5", None, "nan", "inf", "1e999999999"):
        with pytest.raises(WireError):
            integer({"n": bad}, "n")


def test_payment_or_subscription_without_its_ids_is_unreadable() -> None:
    for wire in ({}, {"payment_id": "pay"}, {"payment_id": "", "customer": {"customer_id": "c"}}):
        with pytest.raises(WireError):
            Payment.read(wire)
    with pytest.raises(WireError, match="status"):
        DodoSubscription.read(
            {"subscription_id": "s", "customer": {"customer_id": "c"}, "product_id": "p", "status": "dancing"}
        )


@pytest.mark.parametrize("id_", ["x" * 100_000, "\x00", "a/../b", "", " ", "ÿ" * 200, "?x=1#y"])
async def test_malformed_id_is_refused_or_not_found(world: World, id_: str) -> None:
    for ask in (world.dodo.retrieve_payment, world.dodo.retrieve_dispute, world.dodo.retrieve_subscription):
        with pytest.raises((DodoRefused, DodoUnavailable)):
            await ask(id_)
