"""Verify what farebox relies on at Dodo, case by case, against the offline Dodo or the real one in test mode.

Each case makes what it needs under a name of its own run. It leaves customers and events behind, which Dodo cannot
delete; products are archived, webhooks deleted. It never pays.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import httpx
from dodopayments import APIError, APIStatusError, AsyncDodoPayments
from dodopayments.types import EventInputParam
from dodopayments.types.price_param import OneTimePrice

from billing.dodo.client import TIMEOUT
from billing.dodo.settings import DodoSettings

EVENT_NAME = "farebox.verify"
"""No meter counts it."""
PATIENCE_S = 30.0
"""Seconds until Dodo must show what it has taken."""
LARGEST = 2**53 - 1
"""Of the nanos that a balance may have."""
REFUSED_SHAPE = (400, 422)
Answers = Callable[[], Awaitable[object]]


class Differs(Exception):
    """Dodo does something else than expected; the message says what."""


@dataclass(frozen=True, slots=True)
class Finding:
    expectation: str
    difference: str = ""
    """Empty where the expectation held."""

    @property
    def has_held(self) -> bool:
        return not self.difference


class Contract:
    """Verifies one Dodo; ``run`` is a word that no earlier run has used."""

    def __init__(self, settings: DodoSettings, run: str) -> None:
        self._settings, self._run = settings, run
        self._sdk = self._client(settings.api_key)
        self._customer = ""

    def _client(self, api_key: str) -> AsyncDodoPayments:
        where = {"base_url": self._settings.base_url} if self._settings.base_url else {"environment": "test_mode"}
        return AsyncDodoPayments(bearer_token=api_key, timeout=TIMEOUT, max_retries=0, **where)  # type: ignore[arg-type]

    async def verify(self) -> list[Finding]:
        """Every case in turn; one that differs does not keep the others from being asked."""
        assert self._settings.environment != "live_mode", "only a Dodo in test mode, or the offline one, is verified"
        async with self._sdk:
            return [await _asked(case) for case in self._cases]

    @property
    def _cases(self) -> Sequence[Answers]:
        return (
            self.customers_keep_their_metadata,
            self.pages_are_numbered_from_zero,
            self.a_page_behind_the_last_is_empty,
            self.an_event_id_sent_twice_is_one_event,
            self.an_event_id_twice_in_one_call_is_refused,
            self.a_call_takes_a_thousand_events_and_no_more,
            self.an_event_older_than_an_hour_is_refused,
            self.an_event_of_an_unknown_customer_is_refused,
            self.an_unknown_event_is_not_found,
            self.a_checkout_takes_an_existing_customer,
            self.a_checkout_of_an_unknown_customer_is_refused,
            self.the_portal_has_a_link,
            self.a_webhook_endpoint_is_made_once_and_signs,
            self.a_wrong_key_is_unauthorized,
            self.what_is_unknown_is_not_found,
        )

    async def customers_keep_their_metadata(self) -> None:
        """a customer keeps its metadata"""
        made = await self._new_customer("one")
        self._customer = made
        found = await self._sdk.customers.retrieve(made)
        _equal(_metadata(found, "farebox_tenant"), self._run, "its farebox_tenant")

    async def pages_are_numbered_from_zero(self) -> None:
        """pages are numbered from 0 and do not overlap"""
        await self._new_customer("two")
        pages = [await self._sdk.customers.list(page_number=number, page_size=1) for number in (0, 1)]
        ids = [[_field(one, "customer_id") for one in _items(page)] for page in pages]
        _equal([len(page) for page in ids], [1, 1], "customers on pages 0 and 1")
        if ids[0] == ids[1]:
            raise Differs("pages 0 and 1 show the same customer")
        default = await self._sdk.customers.list(page_size=1)
        _equal([_field(one, "customer_id") for one in _items(default)], ids[0], "the page without a number")

    async def a_page_behind_the_last_is_empty(self) -> None:
        """a page behind the last one is empty"""
        page = await self._sdk.customers.list(page_number=1_000_000, page_size=100)
        _equal(len(_items(page)), 0, "customers on page 1000000")

    async def an_event_id_sent_twice_is_one_event(self) -> None:
        """an event id sent again is not counted again"""
        for _ in range(2):
            await self._sdk.usage_events.ingest(events=[self._event("again")])
        await self._until_known(f"{self._run}-again")
        listed = await self._sdk.usage_events.list(customer_id=self._customer, event_name=EVENT_NAME, page_size=100)
        found = [one for one in _items(listed) if _field(one, "event_id") == f"{self._run}-again"]
        _equal(len(found), 1, "events of that id")
        _equal(_metadata(found[0], "charge_nanos"), LARGEST, "its largest number")

    async def an_event_id_twice_in_one_call_is_refused(self) -> None:
        """an event id twice in one call is refused"""
        await _refused(self._sdk.usage_events.ingest(events=[self._event("twice")] * 2), *REFUSED_SHAPE)

    async def a_call_takes_a_thousand_events_and_no_more(self) -> None:
        """a call takes 1000 events, and not 1001"""
        events = [self._event(f"many-{number}") for number in range(1_001)]
        await _refused(self._sdk.usage_events.ingest(events=events), *REFUSED_SHAPE, 413)
        await self._sdk.usage_events.ingest(events=events[:1_000])

    async def an_event_older_than_an_hour_is_refused(self) -> None:
        """an event of 61 minutes ago is refused, one of 55 minutes ago is taken"""
        old, young = (self._event(f"{minutes}-minutes", minutes) for minutes in (61, 55))
        await _refused(self._sdk.usage_events.ingest(events=[old]), *REFUSED_SHAPE)
        await self._sdk.usage_events.ingest(events=[young])

    async def an_event_of_an_unknown_customer_is_refused(self) -> None:
        """an event of an unknown customer is refused"""
        stray: EventInputParam = {**self._event("stray"), "customer_id": "cus_unknown"}
        await _refused(self._sdk.usage_events.ingest(events=[stray]), 400, 404, 422)

    async def an_unknown_event_is_not_found(self) -> None:
        """an event that was never sent is 404"""
        await _refused(self._sdk.usage_events.retrieve(f"{self._run}-never"), 404)

    async def a_checkout_takes_an_existing_customer(self) -> None:
        """a checkout takes an existing customer and answers a page to pay on"""
        session = await self._checkout(self._customer)
        if not str(session).startswith("http"):
            raise Differs(f"the checkout's address is {session!r}")

    async def a_checkout_of_an_unknown_customer_is_refused(self) -> None:
        """a checkout of an unknown customer is refused"""
        await _refused(self._checkout("cus_unknown"), 400, 404, 422)

    async def the_portal_has_a_link(self) -> None:
        """a customer's portal has a link"""
        portal = await self._sdk.customers.customer_portal.create(self._customer)
        if not str(_field(portal, "link")).startswith("http"):
            raise Differs(f"the portal's link is {portal.link!r}")

    async def a_webhook_endpoint_is_made_once_and_signs(self) -> None:
        """a webhook endpoint with the same idempotency key is made once, and has a whsec_ secret"""
        url, key = f"https://example.com/{self._run}", self._run
        made = [await self._sdk.webhooks.create(url=url, idempotency_key=key) for _ in range(2)]
        first, again = (str(_field(one, "id")) for one in made)
        secret = str(_field(await self._sdk.webhooks.retrieve_secret(first), "secret"))
        for id_ in {first, again}:
            await self._sdk.webhooks.delete(id_)
        _equal(again, first, "the second endpoint's id")
        if not secret.startswith("whsec_"):
            raise Differs("its secret does not begin with whsec_")

    async def a_wrong_key_is_unauthorized(self) -> None:
        """a wrong API key is 401"""
        async with self._client("dodo_test_wrong") as unauthorized:
            await _refused(unauthorized.customers.list(page_size=1), 401)

    async def what_is_unknown_is_not_found(self) -> None:
        """an unknown payment is 404 with a code in capitals"""
        body = (await _refused(self._sdk.payments.retrieve("pay_unknown"), 404)).body
        code = body.get("code") if isinstance(body, dict) else None
        if not isinstance(code, str) or code != code.upper():
            raise Differs(f"the error's code is {code!r}")

    async def _new_customer(self, name: str) -> str:
        email = f"{self._run}-{name}@example.com"
        made = await self._sdk.customers.create(email=email, name=name, metadata={"farebox_tenant": self._run})
        return str(_field(made, "customer_id"))

    async def _checkout(self, customer_id: str) -> str:
        price = OneTimePrice(
            type="one_time_price", price=100, currency="USD", discount=0, purchasing_power_parity=False
        )
        product = await self._sdk.products.create(name=self._run, tax_category="saas", price=price)
        product_id = str(_field(product, "product_id"))
        try:
            session = await self._sdk.checkout_sessions.create(
                product_cart=[{"product_id": product_id, "quantity": 1}], customer={"customer_id": customer_id}
            )
        finally:
            await self._sdk.products.archive(product_id)
        return str(_field(session, "checkout_url"))

    def _event(self, name: str, minutes_ago: float = 0) -> EventInputParam:
        at = datetime.now(UTC) - timedelta(minutes=minutes_ago)
        return {
            "event_id": f"{self._run}-{name}",
            "customer_id": self._customer,
            "event_name": EVENT_NAME,
            "timestamp": at.isoformat(),
            "metadata": {"charge_nanos": LARGEST},
        }

    async def _until_known(self, event_id: str) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while True:
                try:
                    await self._sdk.usage_events.retrieve(event_id)
                    return
                except APIStatusError as error:
                    if error.status_code != httpx.codes.NOT_FOUND:
                        raise
                await asyncio.sleep(0.5)


async def _asked(case: Answers) -> Finding:
    expectation = (case.__doc__ or "").strip()
    try:
        await case()
    except Differs as difference:
        return Finding(expectation, str(difference))
    except TimeoutError:
        return Finding(expectation, f"not within {PATIENCE_S:g} s")
    except APIError as error:
        return Finding(expectation, f"{type(error).__name__}: {error.message}"[:200])
    return Finding(expectation)


async def _refused(call: Awaitable[object], *statuses: int) -> APIStatusError:
    """The refusal with one of these statuses.

    Raises:
        Differs: another status, or none.
    """
    try:
        await call
    except APIStatusError as error:
        if error.status_code in statuses:
            return error
        raise Differs(f"{error.status_code} instead of {' or '.join(map(str, statuses))}") from None
    raise Differs("it was taken")


def _field(reply: object, name: str) -> object:
    """A field of an answer, whatever came: the SDK checks no types. Raises Differs where there is none."""
    value = getattr(reply, name, None)
    if value is None:
        raise Differs(f"the answer has no {name}: {str(reply)[:100]!r}")
    return value


def _items(page: object) -> list[object]:
    items = _field(page, "items")
    if not isinstance(items, list):
        raise Differs(f"the page's items are {str(items)[:100]!r}")
    return items


def _metadata(reply: object, key: str) -> object:
    metadata = _field(reply, "metadata")
    return metadata.get(key) if isinstance(metadata, dict) else None


def _equal(found: object, expected: object, what: str) -> None:
    if found != expected:
        raise Differs(f"{what}: {found!r} instead of {expected!r}")
