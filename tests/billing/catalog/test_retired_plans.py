"""A plan that was in force is never forgotten: processes that start later still know it."""

import logging

import pytest
from redis.asyncio import Redis

from billing.catalog import publication
from billing.catalog.catalog import Catalog
from billing.catalog.plans import Plan
from billing.ledger.admission import plan_of
from billing.store import keys
from billing.tenants.tenant import Tenant
from billing.usage import TenantId
from tests.support.offers import CATALOG, NOON

OLD = Catalog.model_validate(CATALOG)
NEW = Catalog.model_validate(CATALOG | {"plans": {"prepaid": {"kind": "prepaid"}}})


async def test_current_catalog_has_retired_plans(redis: Redis) -> None:
    await publication.publish(redis, OLD, "gw", NOON)
    assert (await publication.current(redis)) == OLD
    await publication.publish(redis, NEW, "gw", NOON)
    found = await publication.current(redis)
    assert found is not None
    assert found.content_hash == NEW.content_hash
    tenant = Tenant(id=TenantId("acme"), email="a@example.com", plan="club")
    assert plan_of(tenant, found) == OLD.plans["club"]


async def test_retired_plan_is_kept_as_it_last_was(redis: Redis) -> None:
    raised = CATALOG | {"plans": CATALOG["plans"] | {"club": {"kind": "pay_as_you_go", "credit_limit": "3"}}}  # type: ignore[operator]
    for catalog in (OLD, Catalog.model_validate(raised), NEW):
        await publication.publish(redis, catalog, "gw", NOON)
    plan = (await publication.plans_ever(redis))["club"]
    assert plan == Plan.model_validate({"kind": "pay_as_you_go", "credit_limit": "3"})


async def test_unreadable_plan_is_logged_and_left_out(redis: Redis, caplog: pytest.LogCaptureFixture) -> None:
    await publication.publish(redis, OLD, "gw", NOON)
    await redis.hset(keys.PLANS, "club", '{"kind": "barter"}')
    with caplog.at_level(logging.WARNING):
        assert set(await publication.plans_ever(redis)) == {"prepaid", "payg"}
    assert "club" in caplog.text
