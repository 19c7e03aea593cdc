"""``farebox deploy`` refuses a file that drops a plan with tenants."""

import pytest
from redis.asyncio import Redis

from billing.catalog import publication
from billing.catalog.catalog import Catalog
from billing.tenants.directory import Tenants
from billing.tenants.tenant import Tenant
from billing.usage import TenantId
from cluster.cli.deploy import refuse_lost_plans
from cluster.local.configuration import store_options
from cluster.local.launch import LaunchError

STRICT = store_options({})
CATALOG = {
    "models": [{"id": "base", "price": {"input_per_1m": "1"}}],
    "plans": {
        "prepaid": {"kind": "prepaid"},
        "payg": {"kind": "pay_as_you_go", "credit_limit": "5"},
        "club": {"kind": "pay_as_you_go", "credit_limit": "9"},
    },
    "default_plan": "prepaid",
}
OLD = Catalog.model_validate(CATALOG)
NEW = Catalog.model_validate(CATALOG | {"plans": {"prepaid": {"kind": "prepaid"}}})


async def create_tenants(redis: Redis, plan: str, *names: str) -> None:
    for name in names:
        await Tenants(redis).create(Tenant(id=TenantId(name), email=f"{name}@example.com", plan=plan))


async def test_lost_plans_are_named_with_tenants(redis: Redis, store_url: str) -> None:
    await publication.publish(redis, OLD, "gw", 0)
    await create_tenants(redis, "club", *(f"t{number}" for number in range(7)))
    await create_tenants(redis, "payg", "acme")
    with pytest.raises(LaunchError) as refused:
        await refuse_lost_plans(store_url, STRICT, NEW)
    message = str(refused.value)
    assert "club (7 tenants: t0, t1, t2, t3, t4 and 2 more); payg (1 tenant: acme)" in message
    assert "--retire-plans" in message


async def test_plan_without_tenants_may_go(redis: Redis, store_url: str) -> None:
    await publication.publish(redis, OLD, "gw", 0)
    await create_tenants(redis, "prepaid", "acme")
    await refuse_lost_plans(store_url, STRICT, NEW)


async def test_retired_plan_is_reported_once(redis: Redis, store_url: str) -> None:
    await create_tenants(redis, "club", "acme")
    for catalog in (OLD, NEW):
        await publication.publish(redis, catalog, "gw", 0)
    await refuse_lost_plans(store_url, STRICT, NEW)


async def test_first_deployment_loses_no_plan(redis: Redis, store_url: str) -> None:
    await create_tenants(redis, "club", "acme")
    await refuse_lost_plans(store_url, STRICT, NEW)
