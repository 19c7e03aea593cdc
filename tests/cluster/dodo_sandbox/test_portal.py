"""The customer's portal as a browser without JavaScript uses it."""

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import httpx
import pytest

from tests.support.sandbox_world import World, merchant, world


@pytest.fixture
def there(tmp_path: Path) -> Iterator[World]:
    with world(tmp_path / "dodo") as running:
        yield running


class Forms(HTMLParser):
    """The forms of a page, by the text of each button: method, address and what it sends."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: dict[str, tuple[str, str, dict[str, str]]] = {}
        self._form: tuple[str, str, dict[str, str]] | None = None
        self._button: dict[str, str] | None = None
        self._option = ""
        self.options: dict[str, str] = {}
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if tag == "form":
            self._form = (given["method"], given["action"], {})
        elif tag == "input" and self._form is not None:
            self._form[2][given["name"]] = given["value"]
        elif tag == "button":
            self._button = {given["name"]: given["value"]} if "name" in given else {}
        elif tag == "option":
            self._option = given["value"]

    def handle_endtag(self, tag: str) -> None:
        if tag == "form":
            self._form = None
        elif tag == "button":
            self._button = None
        elif tag == "option":
            self._option = ""

    def handle_data(self, data: str) -> None:
        if self._button is not None and self._form is not None:
            method, action, fields = self._form
            self.found[data.strip()] = (method, action, fields | self._button)
        if self._option:
            self.options[data.strip()] = self._option


def portal(there: World, customer: str) -> httpx.Response:
    link = there.dodo.customers.customer_portal.create(customer).link
    page = there.http.get(link)
    assert page.status_code == 200
    assert "<script" not in page.text
    return page


def press(there: World, page: httpx.Response, button: str, **more: str) -> httpx.Response:
    """Press a button of the page, by the first words of its text; the page that it leads to."""
    forms = Forms(page.text).found
    [(method, action, fields)] = [form for text, form in forms.items() if text.startswith(button)]
    sent = fields | more
    if method == "get":
        return there.http.get(action, params=sent)
    return there.http.post(action, data=sent, follow_redirects=True)


def test_portal_cancels_now(there: World) -> None:
    customer = there.customer()
    with merchant() as shop:
        one = there.subscribe(customer, there.recurring())
        there.dodo.webhooks.create(url=shop.url)
        page = press(there, portal(there, customer), "Cancel now")
        assert {"subscription.cancelled", "subscription.updated"} == {seen.type for seen in shop.wait(2)}
    after = there.dodo.subscriptions.retrieve(one.subscription_id)
    assert (after.status, after.cancelled_by and after.cancelled_by.actor_type) == ("cancelled", "customer")
    assert "ended" in page.text
    assert not [button for button in Forms(page.text).found if button.startswith("Cancel")]


def test_portal_cancels_at_period_end_and_keeps(there: World) -> None:
    customer = there.customer()
    one = there.subscribe(customer, there.recurring())
    page = press(there, portal(there, customer), "Cancel at the end")
    assert there.dodo.subscriptions.retrieve(one.subscription_id).cancel_at_next_billing_date
    assert "ends " in page.text
    page = press(there, page, "Keep the subscription")
    assert not there.dodo.subscriptions.retrieve(one.subscription_id).cancel_at_next_billing_date
    press(there, page, "Cancel at the end")
    there.days(32)
    assert there.dodo.subscriptions.retrieve(one.subscription_id).status == "cancelled"


def test_portal_previews_and_changes_plan(there: World) -> None:
    customer = there.customer()
    one = there.subscribe(customer, there.recurring(2000))
    better = there.recurring(3000)
    half = (one.next_billing_date - one.previous_billing_date) / 2
    there.control("clock", now=(one.previous_billing_date + half).isoformat())
    page = press(there, portal(there, customer), "Change plan", product_id=better.product_id)
    assert "Change now for $20.00" in page.text  # 30.00 less the 10.00 that are left of 20.00
    assert len(there.payments(customer)) == 1, "a preview charges nothing"
    press(there, page, "Change now")
    after = there.dodo.subscriptions.retrieve(one.subscription_id)
    assert (after.product_id, after.recurring_pre_tax_amount) == (better.product_id, 3000)
    assert there.dodo.payments.list().items[0].total_amount == 2000


def test_portal_schedules_and_withdraws_a_change(there: World) -> None:
    customer = there.customer()
    one, other = there.subscribe(customer, there.recurring(2000)), there.recurring(500)
    preview = press(there, portal(there, customer), "Change plan", product_id=other.product_id)
    page = press(there, preview, "Change on")
    assert re.search(r"Changes to Pro on \d\d", page.text)
    assert len(there.payments(customer)) == 1
    press(there, page, "Keep this plan")
    assert there.dodo.subscriptions.retrieve(one.subscription_id).scheduled_change is None
    press(there, preview, "Change on")
    there.days(32)
    assert there.dodo.subscriptions.retrieve(one.subscription_id).product_id == other.product_id


def test_portal_says_when_the_card_is_declined(there: World) -> None:
    customer = there.customer()
    one, better = there.subscribe(customer, there.recurring(2000)), there.recurring(3000)
    page = press(there, portal(there, customer), "Change plan", product_id=better.product_id)
    there.control(f"customers/{customer}/card", declines=True)
    refused = press(there, page, "Change now")
    assert refused.status_code == 402
    assert "declined" in refused.text
    assert there.dodo.subscriptions.retrieve(one.subscription_id).product_id == one.product_id


def test_portal_shows_invoices(there: World) -> None:
    customer, other = there.customer(), there.customer("Other")
    paid = there.buy(customer, there.pack(500))
    [link] = re.findall(r'href="(/portal/[^"]+/invoices/[^"]+)"', portal(there, customer).text)
    invoice = there.http.get(link)
    assert (invoice.status_code, invoice.headers["content-type"]) == (200, "application/pdf")
    assert b"USD 5.00" in invoice.content
    assert there.http.get(f"/portal/{other}/invoices/{paid['payment_id']}").status_code == 404


@pytest.mark.parametrize("action", ["cancel", "keep", "change", "keep-plan"])
def test_portal_of_another_customer_changes_nothing(there: World, action: str) -> None:
    one = there.subscribe(there.customer(), there.recurring())
    other = there.customer("Other")
    form = {"when": "now", "product_id": there.recurring(3000).product_id}
    answer = there.http.post(f"/portal/{other}/subscriptions/{one.subscription_id}/{action}", data=form)
    assert answer.status_code == 404
    assert there.dodo.subscriptions.retrieve(one.subscription_id) == one
