"""Compare the three books of a running farebox: receipts, usage records, and the sums at Dodo."""

from collections import Counter
from typing import Any

import httpx

from tests.support.load import Outcome, usd
from tests.support.stack import Stack, Tenant
from tests.support.waiting import eventually

Record = dict[str, Any]
"""A usage record or an account, as the API returns it."""


def records(stack: Stack, tenant: Tenant) -> list[Record]:
    """All usage records of a tenant, read with its own key."""
    found: list[Record] = []
    cursor = ""
    with httpx.Client(base_url=stack.base_url, headers=_bearer(tenant.api_key), timeout=60) as client:
        while True:
            reply = client.get("/v1/usage/records", params={"cursor": cursor, "limit": 100})
            reply.raise_for_status()
            page = reply.json()
            found += page["data"]
            if not page.get("next_cursor"):
                return found
            cursor = page["next_cursor"]


def wait_until_flushed(stack: Stack, timeout_s: float = 60) -> None:
    """Wait until no hold is open and everything is exported to Dodo."""

    def is_flushed() -> bool:
        reply = stack.admin("billing")
        return reply.status_code == 200 and reply.json()["backlog"] == reply.json()["open_holds"] == 0

    eventually(is_flushed, timeout_s)


def account(stack: Stack, tenant: Tenant) -> Record:
    reply = httpx.get(f"{stack.base_url}/v1/account", headers=_bearer(tenant.api_key), timeout=30)
    reply.raise_for_status()
    found: Record = reply.json()
    return found


def assert_books_agree(stack: Stack, outcome: Outcome) -> Counter[str]:
    """Assert that receipts, records and Dodo's sums agree to the nano; returns the number of records by status."""
    statuses: Counter[str] = Counter()
    seen: dict[str, Record] = {}
    sandbox = httpx.get(f"{stack.sandbox_url}/_sandbox/sums", timeout=30).json()
    for tenant in stack.tenants.values():
        mine = records(stack, tenant)
        record_ids = [record["record_id"] for record in mine]
        assert len(record_ids) == len(set(record_ids)), "a record is listed twice"
        seen |= {str(record["record_id"]): record for record in mine}
        statuses.update(str(record["status"]) for record in mine)
        _assert_exported(mine, sandbox.get(tenant.dodo_customer_id, {}), tenant.name)
    missing = [record_id for record_id in outcome.receipts if record_id not in seen]
    assert not missing, f"{len(missing)} receipts have no record, such as {missing[:3]}"
    for record_id, receipt in outcome.receipts.items():
        assert usd(str(seen[record_id]["charged_usd"])) == usd(receipt["cost_usd"]), record_id
    return statuses


def _assert_exported(mine: list[Record], sums: dict[str, dict[str, int]], name: str) -> None:
    overage = sum(usd(str(record["overage_usd"])) for record in mine)
    covered = sum(usd(str(record["charged_usd"])) for record in mine) - overage
    charge, usage = sums.get("farebox.charge", {}), sums.get("farebox.usage", {})
    assert charge.get("charge_nanos", 0) == overage, f"{name}: charged differs"
    assert usage.get("covered_nanos", 0) == covered, f"{name}: covered differs"
    for field in ("prompt_tokens", "completion_tokens"):
        ours = sum(int(record["usage"][field]) for record in mine)
        assert charge.get(field, 0) + usage.get(field, 0) == ours, f"{name}: {field} differ"


def _bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}
