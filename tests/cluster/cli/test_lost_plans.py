"""A deployment that would drop a plan with tenants on it is refused, and says how many and which."""

import pytest
from redis.asyncio import Redis

from billing.catalog import publication
from billing.catalog.catalog import Catalog
from billing.tenants.directory import Tenants
from billing.tenants.tenant import Tenant
from billing.usage import TenantId
from cluster.cli.operate import refuse_lost_plans
from cluster.local.launch import LaunchError, store_terms
from tests.support.offers import CATALOG

TERMS = store_terms({})
OLD = Catalog.model_validate(CATALOG)
NEW = Catalog.model_validate(CATALOG | {"plans": {"prepaid": {"kind": "prepaid"}}})


async def on(redis: Redis, plan: str, *names: str) -> None:
    for name in names:
        await Tenants(redis).create(Tenant(id=TenantId(name), email=f"{name}@example.com", plan=plan))


async def test_it_names_how_many_and_which_and_what_to_do(redis: Redis, store_url: str) -> None:
    await publication.publish(redis, OLD, "gw", 0)
    await on(redis, "club", *(f"t{number}" for number in range(7)))
    await on(redis, "payg", "acme")
    with pytest.raises(LaunchError) as refused:
        await refuse_lost_plans((store_url, TERMS), NEW)
    message = str(refused.value)
    assert "club (7 tenants: t0, t1, t2, t3, t4 and 2 more); payg (1 tenant: acme)" in message
    assert "--retire-plans" in message


async def test_a_plan_that_nobody_is_on_may_go(redis: Redis, store_url: str) -> None:
    await publication.publish(redis, OLD, "gw", 0)
    await on(redis, "prepaid", "acme")
    await refuse_lost_plans((store_url, TERMS), NEW)


async def test_what_was_retired_once_is_not_asked_about_again(redis: Redis, store_url: str) -> None:
    await on(redis, "club", "acme")
    for catalog in (OLD, NEW):
        await publication.publish(redis, catalog, "gw", 0)
    await refuse_lost_plans((store_url, TERMS), NEW)


async def test_a_first_deployment_drops_nothing(redis: Redis, store_url: str) -> None:
    await on(redis, "club", "acme")
    await refuse_lost_plans((store_url, TERMS), NEW)
