"""The pages of buyers who come from a link: adding credit, and the return after paying."""

import json
import re
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from redis.asyncio import Redis

from billing.catalog.catalog import Catalog
from billing.commerce.context import Commerce
from billing.commerce.links import CHECKOUTS_PER_HOUR, LIFETIME_S, Links, Receipt, TopUp
from billing.commerce.sync import sync
from billing.commerce.webhooks import Webhooks
from billing.dodo.client import Dodo
from billing.dodo.settings import DodoSettings
from billing.ledger.account import Adjustment
from billing.money import Nanos, parse_usd
from billing.usage import TenantId, Unit
from cluster.dodo_sandbox.server import SandboxServer
from tests.support.clock import SteppedClock
from tests.support.gateway import USER_CONFIG, Harness, assert_problem, bearer
from tests.support.world import API_KEY, SECRET, delivery

ACME = TenantId("acme")
PACKS: dict[str, object] = {
    "plans": {
        **USER_CONFIG["plans"],  # type: ignore[dict-item]
        "pro": {"kind": "subscription", "monthly_price": "9", "allowance": {"requests": 10}},
    },
    "packs": {
        "small": {"price": "5.00", "grants": {"usd": "5.00"}, "expires_days": 30},
        "medium": {"price": "20.00", "grants": {"usd": "25.00"}},
        "large": {"price": "70.00", "grants": {"usd": "100.00"}, "expires_days": None},
        "calls": {"price": "3.00", "grants": {"requests": 9, "adapters": ["pirate"]}},
    },
}
BROWSER = {"accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}


@pytest.fixture
def sandbox(tmp_path: Path) -> Iterator[SandboxServer]:
    with SandboxServer(tmp_path / "dodo", API_KEY, webhook_secret=SECRET) as server:
        yield server


@pytest.fixture
def calls() -> list[str]:
    """Paths of the calls to Dodo."""
    return []


@pytest.fixture
async def shop(harness: Harness, sandbox: SandboxServer, redis: Redis, calls: list[str]) -> AsyncIterator[Harness]:
    """A gateway with four packs, and a Dodo that has all products."""

    async def note(request: httpx.Request) -> None:
        calls.append(request.url.path)

    harness.gateway.parts.catalog_holder.put(USER_CONFIG | PACKS)
    client = httpx.AsyncClient(trust_env=False, event_hooks={"request": [note]})
    dodo = Dodo(DodoSettings(API_KEY, SECRET, base_url=sandbox.url), http_client=client)
    await sync(dodo, redis, harness.gateway.parts.catalog_holder.current)
    harness.gateway.parts = replace(harness.gateway.parts, dodo=dodo)
    yield harness
    await dodo.close()


class Page(HTMLParser):
    """What a browser would do with a page: its texts, buttons, links, reload, and what it would load."""

    def __init__(self, reply: httpx.Response) -> None:
        super().__init__()
        assert reply.headers["content-type"].startswith("text/html"), reply.text
        self.reply, self.buttons, self.links, self.loads = reply, [], [], []  # type: ignore[var-annotated]
        self.refresh = ""
        self.feed(reply.text)
        self.text = re.sub(r"\s+", " ", re.sub(r"<style>.*?</style>|<[^>]+>", " ", reply.text, flags=re.S))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "button":
            self.buttons.append((given["name"], given["value"]))
        if tag == "a":
            self.links.append(given["href"])
        if tag == "meta" and given.get("http-equiv") == "refresh":
            self.refresh = given["content"] or ""
        if tag in ("script", "img", "link", "iframe") or "src" in given or any(name[:2] == "on" for name in given):
            self.loads.append(tag)


async def customer(harness: Harness, name: str = "acme", usd: str = "1.00") -> str:
    """A tenant that is a customer at Dodo; its API key."""
    key = await harness.tenant(name, usd)
    parts = harness.gateway.parts
    assert parts.dodo is not None
    await parts.tenants.set_customer(
        TenantId(name), await parts.dodo.create_customer(await parts.tenants.get(TenantId(name)))
    )
    return key


async def refused(harness: Harness, key: str, words: int = 3) -> str:
    """The path of the link in a refusal for lack of credit."""
    reply = await harness.chat(key, "one " * words)
    body = assert_problem(reply, 402, "insufficient_credits")
    assert key not in str(body)
    url = str(body["top_up_url"])
    assert url.startswith(harness.gateway.config.public_url + "/top-up/")
    return urlsplit(url).path


async def visit(harness: Harness, path: str) -> Page:
    return Page(await harness.client.get(path, headers=BROWSER))


async def click(harness: Harness, path: str, **choice: str) -> httpx.Response:
    return await harness.client.post(path, data=choice, headers=BROWSER)


def in_browser() -> httpx.AsyncClient:
    return httpx.AsyncClient(trust_env=False, headers=BROWSER)


async def pay(checkout_url: str, card: str = "good") -> str:
    """Pay at the sandbox as a browser does; the path and query to which it sends the buyer back."""
    async with in_browser() as browser:
        sent = await browser.post(f"{checkout_url}/pay", data={"card": card})
    assert sent.status_code == 303, sent.text
    back = urlsplit(sent.headers["location"])
    return f"{back.path}?{back.query}"


async def deliver(harness: Harness, back: str) -> None:
    """What Dodo's webhook does, for the payment that this return address names."""
    parts = harness.gateway.parts
    assert parts.dodo is not None

    async def catalog() -> Catalog:
        return parts.catalog_holder.current

    webhooks = Webhooks(Commerce(parts.redis, parts.dodo, parts.ledger, parts.tenants, catalog), SECRET)
    payment_id = dict(httpx.QueryParams(back.partition("?")[2]))["payment_id"]
    payment = json.loads((await parts.dodo._sdk.payments.retrieve(payment_id)).to_json())
    await webhooks.receive(*delivery("payment.succeeded", payment, f"msg_{payment_id}"))


async def test_link_of_refusal_leads_to_paid_credit(shop: Harness, sandbox: SandboxServer) -> None:
    key = await customer(shop, usd="0")
    path = await refused(shop, key)
    page = await visit(shop, path)
    assert page.buttons[0] == ("pack", "small")
    sent = await click(shop, path, pack="small")
    assert sent.status_code == 303, sent.text
    assert sent.headers["location"].startswith(sandbox.url)
    back = await pay(sent.headers["location"])
    assert "confirmed" in (await visit(shop, back)).text
    await deliver(shop, back)
    receipt = await visit(shop, back)
    assert "pack small" in receipt.text
    assert "Balance now $5.00" in receipt.text
    assert (await shop.chat(key)).status_code == 200


@pytest.mark.parametrize(
    ("debt", "first"), [("0.01", "small"), ("4.95", "small"), ("5.00", "medium"), ("24.90", "medium"), ("60", "large")]
)
async def test_smallest_pack_that_covers_the_debt_is_first(shop: Harness, debt: str, first: str) -> None:
    key = await customer(shop, usd="0")
    await shop.gateway.parts.ledger.adjust(Adjustment("t", ACME, Unit.NANOS, Nanos(-parse_usd(debt)), "test"))
    path = await refused(shop, key)
    assert (await visit(shop, path)).buttons[0] == ("pack", first)
    offered = (await shop.client.get(path)).json()
    assert offered["packs"][0]["id"] == first
    assert {one["id"] for one in offered["packs"]} == {"small", "medium", "large", "calls"}


async def test_largest_pack_is_first_when_none_covers(shop: Harness) -> None:
    token = await shop.gateway.parts.links.write(TopUp(ACME, parse_usd("1000")))
    await customer(shop)
    assert (await visit(shop, f"/top-up/{token}")).buttons[0] == ("pack", "large")


async def test_only_a_click_opens_a_checkout(shop: Harness, calls: list[str]) -> None:
    path = await refused(shop, await customer(shop, usd="0"))
    calls.clear()
    for _ in range(3):
        await shop.client.get(path)
        await visit(shop, path)
        assert (await shop.client.head(path)).status_code == 405
    assert calls == []
    await click(shop, path, pack="small")
    assert calls == ["/checkouts"]


async def test_checkouts_from_links_are_bounded_per_tenant(shop: Harness, calls: list[str]) -> None:
    acme, other = await customer(shop, usd="0"), await customer(shop, "other", usd="0")
    paths = [await refused(shop, acme) for _ in range(CHECKOUTS_PER_HOUR + 2)]
    assert (await click(shop, paths[0], pack="none")).status_code == 404
    statuses = [(await click(shop, path, pack="small")).status_code for path in paths]
    assert statuses == [303] * CHECKOUTS_PER_HOUR + [429] * 2, "what is not sold does not count"
    assert calls.count("/checkouts") == CHECKOUTS_PER_HOUR
    page = await click(shop, paths[0], pack="small")
    assert "retry in" in Page(page).text
    assert 0 < int(page.headers["retry-after"]) <= 3600
    assert_problem(await shop.client.post(paths[0], json={"pack": "small"}), 429, "too_many_checkouts")
    assert (await click(shop, await refused(shop, other), pack="small")).status_code == 303


async def test_client_without_browser_gets_json(shop: Harness, sandbox: SandboxServer) -> None:
    path = await refused(shop, await customer(shop, usd="0"))
    [first, *_] = (await shop.client.get(path, headers={"accept": "application/json"})).json()["packs"]
    assert (first["id"], first["price_usd"], first["grants"]["amount"]) == ("small", "5.000000", "5.000000")
    assert urlsplit(first["buy"]["url"]).path == path
    for sent in ({"json": first["buy"]["body"]}, {}):
        opened = await shop.client.post(path, **sent)
        assert opened.status_code == 200, opened.text
        assert opened.json()["checkout_url"].startswith(f"{sandbox.url}/checkout/{opened.json()['session_id']}")


@pytest.mark.parametrize("sent", [{"json": {"pack": 1}}, {"json": {"spend": "all"}}, {"content": b"pack=\xff"}])
async def test_bad_choice_refused(shop: Harness, sent: dict[str, object]) -> None:
    path = await refused(shop, await customer(shop, usd="0"))
    assert_problem(await shop.client.post(path, **sent), 400, "invalid_request")  # type: ignore[arg-type]
    assert_problem(await shop.client.post(path, json={"pack": "none"}), 404, "not_found")
    assert_problem(await shop.client.post(path, json={"pack": "small", "plan": "pro"}), 400, "invalid_request")


async def test_bad_pack_is_not_blamed_on_the_link(shop: Harness) -> None:
    path = await refused(shop, await customer(shop, usd="0"))
    for choice in ({"pack": "\n"}, {"pack": "none"}):
        reply = await click(shop, path, **choice)
        assert reply.status_code == 404
        assert "This is not sold here" in reply.text
        assert "small" in reply.text
        assert "does not work" not in reply.text


async def test_link_does_nothing_else(shop: Harness) -> None:
    key = await customer(shop, usd="0")
    path = await refused(shop, key)
    token = path.rpartition("/")[2]
    for method, route in (("GET", "account"), ("GET", "invoices"), ("POST", "portal"), ("GET", "usage")):
        reply = await shop.client.request(method, f"/v1/{route}", headers=bearer(token))
        assert_problem(reply, 401, "invalid_api_key")
    assert_problem(await shop.client.get(f"/paid/{token}"), 404, "link_invalid")
    receipt = await shop.gateway.parts.links.write(Receipt(ACME, "pack:small", "pdt"))
    assert_problem(await shop.client.get(f"/top-up/{receipt}"), 404, "link_invalid")
    shown = (await shop.client.get(path)).text + (await visit(shop, path)).reply.text
    for secret in ("acme", "balance", "needed", key):
        assert secret not in shown


async def test_link_expires_and_cannot_be_altered(shop: Harness, redis: Redis) -> None:
    key = await customer(shop, usd="0")
    path = await refused(shop, key)
    now = SteppedClock()
    old = Links(redis, lambda: now() - (LIFETIME_S + 60) * 1000)
    fresh = Links(redis, lambda: now() - (LIFETIME_S - 60) * 1000)
    bad = [path[:-8] + "AAAAAAA=", path + "x", "/top-up/x", "/top-up/" + await old.write(TopUp(ACME))]
    for one in bad:
        for reply in (await shop.client.get(one), await shop.client.post(one, json={"pack": "small"})):
            assert_problem(reply, 404, "link_invalid")
        page = await visit(shop, one)
        assert page.reply.status_code == 404
        assert "expired" in page.text
        assert "This link does not work" in page.text
        assert "top_up_url" not in page.text
    assert (await shop.client.get("/top-up/" + await fresh.write(TopUp(ACME)))).status_code == 200


async def test_link_of_one_process_opens_at_another(shop: Harness, redis: Redis) -> None:
    await customer(shop)
    token = await Links(redis).write(TopUp(ACME))
    assert (await shop.client.get(f"/top-up/{token}")).status_code == 200


async def test_suspended_tenant_buys_nothing(shop: Harness, calls: list[str]) -> None:
    path = await refused(shop, await customer(shop, usd="0"))
    await shop.gateway.parts.tenants.update(ACME, lambda t: t.model_copy(update={"suspended": True}))
    assert_problem(await shop.client.post(path), 403, "tenant_suspended")
    page = await visit(shop, path)
    assert "ask the operator" in page.text
    assert "acme" not in page.text
    assert "/checkouts" not in calls


async def test_link_without_packs_offers_plans(shop: Harness) -> None:
    path = await refused(shop, await customer(shop, usd="0"))
    shop.gateway.parts.catalog_holder.put(USER_CONFIG | PACKS | {"packs": {}})
    assert set((await visit(shop, path)).buttons) == {("plan", "payg"), ("plan", "pro")}
    assert (await click(shop, path, plan="pro")).status_code == 303
    shop.gateway.parts.catalog_holder.put(USER_CONFIG | {"packs": {}, "plans": {"prepaid": {"kind": "prepaid"}}})
    page = await visit(shop, path)
    assert page.buttons == []
    assert "Ask whoever runs this service" in page.text
    assert_problem(await shop.client.post(path), 404, "not_found")


async def test_link_without_payments_says_whom_to_ask(harness: Harness) -> None:
    path = await refused(harness, await harness.tenant(usd="0"))
    page = await visit(harness, path)
    assert page.reply.status_code == 503
    assert "ask the operator" in page.text


async def returned(shop: Harness, key: str, card: str = "good", **asked: str) -> str:
    opened = await shop.post(key, "/v1/checkout", **(asked or {"pack": "small"}))
    return await pay(opened.json()["checkout_url"], card)


async def test_return_after_subscribing_names_the_plan(shop: Harness) -> None:
    key = await customer(shop)
    back = await returned(shop, key, plan="pro")
    assert "being confirmed" in (await visit(shop, back)).text
    await deliver(shop, back)
    page = await visit(shop, back)
    assert "You are subscribed to pro" in page.text
    assert "10 requests" in page.text
    body = (await shop.client.get(back)).json()
    assert (body["state"], body["product"], body["granted"]) == ("paid", "plan:pro", None)


async def test_return_after_buying_requests(shop: Harness) -> None:
    key = await customer(shop)
    back = await returned(shop, key, pack="calls")
    await deliver(shop, back)
    assert "9 requests on pirate" in (await visit(shop, back)).text
    body = (await shop.client.get(back)).json()
    assert body["granted"] == {
        "unit": "requests", "amount": 9, "adapters": ["pirate"], "expires_at_ms": body["granted"]["expires_at_ms"],
    }  # fmt: skip
    assert body["balance_usd"] == "1.000000"


async def test_return_reloads_itself_until_the_webhook_came(shop: Harness) -> None:
    back = await returned(shop, await customer(shop))
    waits, page = [], await visit(shop, back)
    while page.refresh:
        wait, _, target = page.refresh.partition("; url=")
        waits.append(int(wait))
        page = await visit(shop, f"{urlsplit(back).path}{target}")
    assert waits == [2, 4, 8, 16] + [30] * 8
    assert "Reload this page" in page.text
    await deliver(shop, back)
    assert not (await visit(shop, back)).refresh


async def test_declined_payment_can_be_tried_again(shop: Harness, sandbox: SandboxServer) -> None:
    key = await customer(shop)
    opened = (await shop.post(key, "/v1/checkout", pack="medium")).json()
    assert (await pay(opened["checkout_url"], "declined")).startswith("/checkout/"), "the sandbox lets one try again"
    async with in_browser() as browser:
        at_dodo = Page(await browser.get(opened["checkout_url"]))
    [back] = [link for link in at_dodo.links if "/paid/" in link]
    assert "status=failed" in back
    back = back.replace("http://127.0.0.1:8000", "")
    page = await visit(shop, back)
    assert "did not go through" in page.text
    [again] = [urlsplit(link).path for link in page.links]
    assert (await visit(shop, again)).buttons[0] == ("pack", "medium")
    assert (await click(shop, again, pack="medium")).status_code == 303
    assert await shop.balance() == parse_usd("1.00")


async def test_declined_retry_link_lives_no_longer_than_its_receipt(shop: Harness, redis: Redis) -> None:
    await customer(shop)
    now = SteppedClock()
    age_ms = (LIFETIME_S - 60) * 1000
    token = await Links(redis, lambda: now() - age_ms).write(Receipt(ACME, "pack:small", "pdt"))
    again = (await shop.client.get(f"/paid/{token}?status=failed")).json()["try_again_url"].rpartition("/")[2]
    later = Links(redis, lambda: now() + 120_000)
    assert await Links(redis, now).read(TopUp, again) == TopUp(ACME, product="pack:small")
    with pytest.raises(Exception, match="expired"):
        await later.read(TopUp, again)


async def test_payment_of_another_tenant_or_product_is_not_shown(shop: Harness) -> None:
    key, other = await customer(shop), await customer(shop, "other", usd="77.00")
    theirs = await returned(shop, other)
    await deliver(shop, theirs)
    mine, medium = await returned(shop, key), await returned(shop, key, pack="medium")
    query = theirs.partition("?")[2]
    for back in (mine, medium):
        stolen = f"{back.partition('?')[0]}?{query}"
        assert (await shop.client.get(stolen)).json()["state"] == "confirming"
        page = await visit(shop, stolen)
        assert "77" not in page.text
        assert "82" not in page.text
    await deliver(shop, mine)
    swapped = f"{medium.partition('?')[0]}?{mine.partition('?')[2]}"
    assert (await shop.client.get(swapped)).json()["state"] == "confirming"
    assert_problem(await shop.client.get(f"/paid/guess?{query}"), 404, "link_invalid")


async def test_licence_key_in_the_address_is_dropped(shop: Harness, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(0)
    back = await returned(shop, await customer(shop))
    secret = "0e1f6a1c-licence-key"
    reply = await shop.client.get(f"{back}&license_key={secret}&email=a%40example.com", headers=BROWSER)
    assert reply.status_code == 303
    assert secret not in reply.text + str(reply.headers)
    assert "example.com" not in reply.headers["location"]
    after = await visit(shop, f"{urlsplit(back).path}{reply.headers['location']}")
    assert "being confirmed" in after.text
    body = await shop.client.get(f"{back}&license_key={secret}")
    assert secret not in body.text
    assert secret not in after.reply.text
    farebox = [record.getMessage() for record in caplog.records if not record.name.startswith(("httpx", "httpcore"))]
    assert secret not in " ".join(farebox)


async def test_hint_in_the_address_is_escaped(shop: Harness) -> None:
    back = await returned(shop, await customer(shop))
    evil = "%22%3E%3Cscript%3Ealert(1)%3C/script%3E"
    page = await visit(shop, f"{back.partition('?')[0]}?payment_id={evil}&status={evil}&subscription_id={evil}")
    assert "being confirmed" in page.text
    assert page.loads == []
    assert "<script" not in page.reply.text
    long = await visit(shop, f"{back.partition('?')[0]}?payment_id={'x' * 200}")
    assert long.reply.status_code == 400


async def test_return_url_of_the_client_is_kept(shop: Harness) -> None:
    key = await customer(shop)
    opened = await shop.post(key, "/v1/checkout", pack="small", return_url="http://shop.example/thanks?cart=7")
    back = await pay(opened.json()["checkout_url"])
    assert back.startswith("/thanks?cart=7&payment_id=pay_")


async def test_pages_load_nothing_and_forbid_it(shop: Harness) -> None:
    key = await customer(shop, usd="0")
    path = await refused(shop, key)
    back = await returned(shop, key)
    confirming = await visit(shop, back)
    await deliver(shop, back)
    pages = [await visit(shop, one) for one in (path, back, back + "&status=failed", "/top-up/x")]
    for page in (*pages, confirming):
        policy = page.reply.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; style-src 'sha256-")
        assert "unsafe" not in policy
        assert "script" not in policy
        assert page.reply.headers["cache-control"] == "no-store"
        assert page.reply.headers["referrer-policy"] == "no-referrer"
        assert page.loads == []
        assert 'name="viewport"' in page.reply.text
        assert "prefers-color-scheme: dark" in page.reply.text
        assert "set-cookie" not in page.reply.headers
