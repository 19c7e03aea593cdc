"""What is hidden is offered to the arm that names it only; a dropped plan names its tenants."""

import pytest

from billing.catalog.catalog import Catalog
from billing.commerce.offers import left_behind, offers_to
from billing.tenants.tenant import Subscription, SubscriptionStatus, Tenant
from billing.usage import TenantId
from tests.support.offers import CATALOG, NOON

TENANTS = [TenantId(f"tenant-{number}") for number in range(50)]


def test_hidden_offers_go_to_their_arm() -> None:
    catalog = Catalog.model_validate(CATALOG)
    [experiment] = catalog.pricing.experiments
    arms = {tenant: experiment.arm_of(tenant).id for tenant in TENANTS}
    assert set(arms.values()) == {"control", "trial"}
    for tenant, arm in arms.items():
        found = offers_to(tenant, catalog, NOON)
        assert set(found.packs) == ({"small", "trial"} if arm == "trial" else {"small"})
        assert set(found.plans) == ({"payg", "club"} if arm == "trial" else {"payg"})


def test_what_an_experiment_offers_ends_with_it() -> None:
    catalog = Catalog.model_validate(CATALOG)
    for tenant in TENANTS:
        found = offers_to(tenant, catalog, NOON + 86_400_000)
        assert (set(found.packs), set(found.plans)) == ({"small"}, {"payg"})


def test_arm_offers_nothing_that_the_catalogue_lacks() -> None:
    arm = {"packs": ["gone"], "plans": ["gone", "prepaid"]}
    pricing = {"experiments": [{"id": "x", "arms": [{"id": "a", **arm}, {"id": "b", **arm}]}]}
    found = offers_to(TENANTS[0], Catalog.model_validate(CATALOG | {"pricing": pricing}), NOON)
    assert (set(found.packs), set(found.plans)) == ({"small"}, {"payg"})


@pytest.mark.parametrize(
    ("plan", "carried", "status", "expected"),
    [
        ("payg", "", None, {"payg"}),
        ("prepaid", "payg", SubscriptionStatus.ACTIVE, {"payg"}),
        ("prepaid", "payg", SubscriptionStatus.PAUSED, {"payg"}),
        ("prepaid", "payg", SubscriptionStatus.CANCELLED, set()),
        ("club", "payg", SubscriptionStatus.ACTIVE, {"payg", "club"}),
        ("prepaid", "", None, set()),
        ("never-was", "", None, set()),
    ],
)
def test_dropped_plan_names_its_tenants(
    plan: str, carried: str, status: SubscriptionStatus | None, expected: set[str]
) -> None:
    old = Catalog.model_validate(CATALOG)
    new = Catalog.model_validate(CATALOG | {"plans": {"prepaid": {"kind": "prepaid"}}})
    subscription = (
        Subscription(id="s", plan=carried, status=status, period_start_ms=0, period_end_ms=1) if status else None
    )
    tenant = Tenant(id=TenantId("acme"), email="a@example.com", plan=plan, subscription=subscription)
    assert left_behind([tenant], old, new) == {name: ["acme"] for name in expected}
    assert left_behind([tenant], old, old) == {}
    assert left_behind([tenant], new, old) == {}, "a new plan leaves no tenant behind"


def test_retired_plans_are_no_part_of_the_content() -> None:
    old = Catalog.model_validate(CATALOG)
    new = Catalog.model_validate(CATALOG | {"plans": {"prepaid": {"kind": "prepaid"}}})
    remembered = new.remembering(old.plans)
    assert remembered.content_hash == new.content_hash
    assert set(remembered.retired) == {"payg", "club"}
    assert remembered.plan_named("payg") == old.plans["payg"]
    assert remembered.plan_named("prepaid") == new.plans["prepaid"]
    assert remembered.plan_named("never-was") is None
    assert Catalog.model_validate_json(remembered.model_dump_json()) == new
