"""Values that many tests of money begin with."""

from dataclasses import replace

from redis.asyncio import Redis

from billing.catalog.plans import Limits
from billing.ledger.account import Bucket, Funding, Grant, HoldRequest, Settlement
from billing.pricing.prices import Price
from billing.store.keys import shard_for
from billing.usage import BucketId, RequestId, Status, TenantId, Unit, Usage, UsageRecord

ACME = TenantId("acme")
MAX_COST = 50_000
"""What ``request`` holds."""
PER_TOKEN = Price.model_validate({"input_per_1m": "1", "output_per_1m": "2"})
"""1,000 nanos for a prompt token, 2,000 for a completion token."""
FREE = Price(free=True)


def request(request_id: str = "req_1", **changes: object) -> HoldRequest:
    """10 prompt tokens and up to 20 more: at most 50,000 nanos."""
    base = HoldRequest(
        request_id=RequestId(request_id),
        tenant=ACME,
        key_id="key_1",
        model="pirate",
        adapter="pirate@0123456789ab",
        adapter_class="default",
        plan="prepaid",
        price=PER_TOKEN,
        prompt_tokens=10,
        max_tokens=20,
        funding=Funding(),
        limits=Limits(),
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def settlement(request_id: str = "req_1", completion: int = 5, status: Status = Status.COMPLETE) -> Settlement:
    """What ``request`` costs with so many tokens generated: 20,000 nanos for five."""
    usage = Usage(prompt_tokens=10, completion_tokens=completion)
    return Settlement(RequestId(request_id), ACME, usage, PER_TOKEN.charge(usage), status)


def money(amount: int, source: str = "payment:1", expires_at_ms: int | None = None) -> Grant:
    return Grant(source, ACME, Unit.NANOS, amount, expires_at_ms)


def calls(amount: int, source: str = "payment:1", adapters: tuple[str, ...] = ()) -> Grant:
    return Grant(source, ACME, Unit.REQUESTS, amount, adapters=adapters)


def allowance(bucket_id: str, amount: int, ends_at_ms: int) -> Bucket:
    return Bucket(BucketId(bucket_id), Unit.NANOS, amount, amount, ends_at_ms, is_allowance=True)


async def records(store: Redis) -> list[UsageRecord]:
    entries = await store.xrange(shard_for(ACME).stream)
    return [UsageRecord.from_json(fields["p"]) for _, fields in entries if fields["k"] == "usage"]
