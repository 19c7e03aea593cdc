"""``farebox reconcile`` on a whole farebox: no difference after a mixed load, and every manual change is named."""

import asyncio
import json
from collections.abc import Callable

import httpx
import pytest
import redis

from billing.store.keys import shard_for
from billing.usage import TenantId
from tests.e2e import books
from tests.support import load
from tests.support.stack import Stack, Tenant
from tests.support.waiting import eventually

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),  # clients that hang up
]

NAMES = ("free", "prepaid", "payg", "pro")


@pytest.fixture(scope="module")
def loaded(stack: Stack) -> Stack:
    outcome = asyncio.run(load.run(stack, [stack.tenants[name] for name in NAMES], 120, seed=3))
    assert outcome.receipts
    assert outcome.hung_up
    books.wait_until_flushed(stack, 120)
    return stack


@pytest.fixture
def store(loaded: Stack) -> "redis.Redis":
    url = json.loads(loaded.cli("status", "--json").stdout)["run"]["store_url"]
    return redis.Redis.from_url(url, decode_responses=True)


def differences(stack: Stack) -> list[dict[str, object]]:
    done = stack.cli("reconcile", "--json", check=False)
    found: list[dict[str, object]] = json.loads(done.stdout)["drift"]
    assert done.returncode == (1 if found else 0), done.stdout
    return found


def test_reconcile_exits_0_when_books_agree(loaded: Stack) -> None:
    done = loaded.cli("reconcile")
    assert "every proof holds to the nano" in done.stdout
    assert "dodo meter" in done.stdout
    assert loaded.cli("reconcile", "--full").returncode == 0


def test_reconcile_names_an_altered_record(loaded: Stack, store: "redis.Redis") -> None:
    tenant = loaded.tenants["prepaid"]
    record_id = str(books.records(loaded, tenant)[0]["record_id"])
    before = rewrite(store, tenant, record_id, lambda record: record.update(charged_nanos=record["charged_nanos"] + 1))
    try:
        named = [row for row in differences(loaded) if row["proof"] == "records"]
        assert [row["tenant"] for row in named] == ["prepaid"]
        assert f"{record_id} is not as it was written" in str(named[0]["named"])
        assert named[0]["difference"] == 1
    finally:
        restore(store, tenant, before)
    assert differences(loaded) == []


def test_reconcile_and_metric_show_a_nano_added_to_a_bucket(loaded: Stack, store: "redis.Redis") -> None:
    tenant = TenantId("prepaid")
    key = shard_for(tenant).buckets(tenant)
    name, value = next(iter(store.hgetall(key).items()))
    unit, remaining, rest = value.split("|", 2)
    store.hset(key, name, f"{unit}|{int(remaining) + 1}|{rest}")
    try:
        (row,) = differences(loaded)
        assert (row["proof"], row["tenant"], row["difference"]) == ("credit", "prepaid", 1)
        assert f"bucket {name} has" in str(row["named"])
        eventually(lambda: _difference(loaded) == 1, 120)
        assert "bucket" in loaded.cli("status").stdout
    finally:
        store.hset(key, name, value)
    assert differences(loaded) == []
    eventually(lambda: _difference(loaded) == 0, 120)


Entries = list[tuple[str, dict[str, str]]]


def rewrite(
    store: "redis.Redis", tenant: Tenant, record_id: str, change: Callable[[dict[str, int]], object]
) -> Entries:
    """Alter one record in the stream; returns the entries as they were."""
    before: Entries = store.xrange(shard_for(TenantId(tenant.name)).stream)
    after: Entries = []
    for id_, fields in before:
        record = json.loads(fields["p"])
        if record.get("record_id") == record_id:
            change(record)
        same = json.dumps(record, separators=(",", ":"))
        after.append((id_, fields | {"p": same} if record.get("record_id") == record_id else fields))
    assert after != before
    restore(store, tenant, after)
    return before


def restore(store: "redis.Redis", tenant: Tenant, entries: Entries) -> None:
    stream = shard_for(TenantId(tenant.name)).stream
    pipe = store.pipeline(transaction=True)
    pipe.delete(stream)
    for id_, fields in entries:
        pipe.xadd(stream, fields, id=id_)  # type: ignore[arg-type]
    pipe.execute()


def _difference(stack: Stack) -> float:
    lines = httpx.get(stack.metrics_url, timeout=30).text.splitlines()
    shown = [line for line in lines if line.startswith("ray_farebox_reconcile_difference_nanos") and '"store"' in line]
    return max((float(line.rsplit(" ", 1)[1]) for line in shown), default=-1.0)
