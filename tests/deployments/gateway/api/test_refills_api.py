"""Auto-refill over the API."""

import pytest

from billing.commerce.auto_refill.refill import Attempt
from billing.commerce.auto_refill.store import Refills
from billing.usage import TenantId
from tests.support.gateway import Harness, bearer

WANTED = {"pack": "small", "threshold_usd": "1.00", "monthly_cap_usd": "20"}
PATH = "/v1/account/auto-refill"


async def test_refill_is_set_up_shown_and_stopped(harness: Harness) -> None:
    key = bearer(await harness.tenant())
    assert (await harness.client.get(PATH, headers=key)).status_code == 404
    made = await harness.client.put(PATH, json=WANTED, headers=key)
    assert made.status_code == 200, made.text
    assert (made.json()["on"], made.json()["threshold_usd"], made.json()["monthly_cap_usd"]) == (
        True,
        "1.000000",
        "20.000000",
    )
    assert (await harness.client.get(PATH, headers=key)).json() == made.json()
    stopped = (await harness.client.delete(PATH, headers=key)).json()
    assert (stopped["on"], stopped["stopped_because"]) == (False, "switched off by the tenant")


async def test_refill_set_up_again_keeps_attempt_in_flight(harness: Harness) -> None:
    key = bearer(await harness.tenant("acme"))
    await harness.client.put(PATH, json=WANTED, headers=key)
    attempt = Attempt(id="refill_1", started_at_ms=5, cents=500)
    refills = Refills(harness.gateway.parts.redis)
    await refills.change(TenantId("acme"), lambda refill: refill.begun(attempt, 0))
    shown = (await harness.client.put(PATH, json=WANTED | {"threshold_usd": "2"}, headers=key)).json()
    assert [one["state"] for one in shown["attempts"]] == ["started"]
    assert shown["threshold_usd"] == "2.000000"


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"pack": "nowhere"}, 400),
        ({"threshold_usd": "99"}, 400),
        ({"monthly_cap_usd": "0.01"}, 400),
        ({"monthly_cap_usd": "0"}, 400),
        ({"threshold_usd": 1.5}, 400),
        ({"threshhold_usd": "1"}, 400),
    ],
)
async def test_refill_refused_when_it_cannot_work(harness: Harness, change: dict[str, object], status: int) -> None:
    key = bearer(await harness.tenant())
    refused = await harness.client.put(PATH, json=WANTED | change, headers=key)
    assert refused.status_code == status
    assert refused.json()["error"]["message"]
    assert (await harness.client.get(PATH, headers=key)).status_code == 404


async def test_refill_refused_without_key(harness: Harness) -> None:
    assert (await harness.client.get(PATH)).status_code == 401
