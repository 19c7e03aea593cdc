"""A catalog and usage records for reports: what was bought, and what was drawn of it."""

from dataclasses import replace

from billing.catalog.catalog import Catalog
from billing.catalog.publication import CatalogHistory
from billing.money import Nanos
from billing.reports.worth import Worth
from billing.usage import BucketId, Draw, RequestId, Status, TenantId, Unit, Usage, UsageRecord

USD, HOUR_MS = 1_000_000_000, 3_600_000
CATALOG = Catalog.model_validate(
    {
        "models": [{"id": "base", "price": {"input_per_1m": "1"}}],
        "plans": {
            "prepaid": {"kind": "prepaid"},
            "pro": {
                "kind": "subscription",
                "monthly_price": "100",
                "allowance": {"requests": 5000},
                "credit_limit": "9",
            },
            "free": {"kind": "free", "allowance": {"usd": "1"}},
        },
        "packs": {
            "bonus": {"price": "50", "grants": {"usd": "55"}},
            "calls": {"price": "50", "grants": {"requests": 10_000}},
        },
        "default_plan": "prepaid",
    }
)
WORTH = Worth(
    CatalogHistory.of((0, CATALOG)), {"pdt_bonus": "pack:bonus", "pdt_calls": "pack:calls", "pdt_old": "pack:gone"}
)


def record(bucket: str, amount: int, unit: Unit = Unit.NANOS, **changes: object) -> UsageRecord:
    charged = amount if unit is Unit.NANOS else 0
    made = UsageRecord(
        record_id="rec_1",
        request_id=RequestId("req_1"),
        tenant=TenantId("acme"),
        key_id="key_1",
        adapter="pirate@abc",
        adapter_class="chat",
        plan="prepaid",
        price_version="pv_1",
        usage=Usage(prompt_tokens=10, completion_tokens=50, compute_ms=1_000),
        status=Status.COMPLETE,
        occurred_at_ms=5 * HOUR_MS,
        list_nanos=Nanos(charged),
        charged_nanos=Nanos(charged),
        draws=(Draw(BucketId(bucket), unit, amount),),
    )
    return replace(made, **changes)  # type: ignore[arg-type]
