"""Tenants and keys: who may send, and how soon a change is seen."""

import asyncio

import pytest
from redis.asyncio import Redis

from billing.tenants import directory
from billing.tenants.directory import CACHE_S, Tenants
from billing.tenants.errors import CustomerTaken, InvalidKey, TenantExists, TenantSuspended, UnknownKey, UnknownTenant
from billing.tenants.tenant import Subscription, SubscriptionStatus, Tenant, new_key
from billing.usage import TenantId
from tests.support.clock import SteppedClock
from tests.support.kills import killed_before
from tests.support.samples import ACME

TENANT = Tenant(id=ACME, email="ops@acme.test", plan="prepaid", created_at_ms=1)


@pytest.fixture
def tenants(store: Redis, clock: SteppedClock) -> Tenants:
    return Tenants(store, clock)


async def test_new_tenant_is_found_and_wants_a_customer(tenants: Tenants) -> None:
    await tenants.create(TENANT)
    assert await tenants.get(ACME) == TENANT
    assert await tenants.list() == [TENANT]
    assert await tenants.customers_wanted() == [ACME]


async def test_tenant_id_is_unique_and_creation_idempotent(tenants: Tenants) -> None:
    await tenants.create(TENANT)
    assert await tenants.create(TENANT) == TENANT
    with pytest.raises(TenantExists):
        await tenants.create(TENANT.model_copy(update={"email": "thief@acme.test"}))
    assert (await tenants.get(ACME)).email == "ops@acme.test"


async def test_unknown_tenant_is_an_error_everywhere(tenants: Tenants) -> None:
    _, key = new_key(TenantId("ghost"), 0)
    for call in (
        tenants.get(TenantId("ghost")),
        tenants.update(TenantId("ghost"), lambda t: t),
        tenants.set_customer(TenantId("ghost"), "cus_1"),
        tenants.add_key(key),
    ):
        with pytest.raises(UnknownTenant):
            await call


async def test_tenant_is_found_by_its_customer(tenants: Tenants) -> None:
    await tenants.create(TENANT)
    await tenants.set_customer(ACME, "cus_1")
    found = await tenants.by_customer("cus_1")
    assert found is not None
    assert found.id == ACME
    assert await tenants.customers_wanted() == []
    assert await tenants.by_customer("cus_2") is None


async def test_customer_belongs_to_one_tenant(tenants: Tenants) -> None:
    thief = TENANT.model_copy(update={"id": TenantId("thief")})
    await tenants.create(TENANT)
    await tenants.create(thief)
    for _ in range(2):
        await tenants.set_customer(ACME, "cus_1")
    with pytest.raises(CustomerTaken, match="acme"):
        await tenants.set_customer(thief.id, "cus_1")
    with pytest.raises(CustomerTaken):
        await tenants.create(TENANT.model_copy(update={"id": TenantId("third"), "dodo_customer_id": "cus_1"}))
    found = await tenants.by_customer("cus_1")
    assert found is not None
    assert (found.id, (await tenants.get(thief.id)).dodo_customer_id) == (ACME, "")
    assert await tenants.customers_wanted() == [thief.id]


async def test_concurrent_updates_all_take_effect(store: Redis) -> None:
    writers = [Tenants(store) for _ in range(8)]
    await writers[0].create(TENANT.model_copy(update={"name": ""}))
    await asyncio.gather(
        *(w.update(ACME, lambda t: t.model_copy(update={"name": t.name + "x"})) for w in writers),
    )
    assert (await writers[0].get(ACME)).name == "x" * 8


async def test_subscription_is_stored(tenants: Tenants) -> None:
    subscription = Subscription(
        id="sub_1", plan="pro", status=SubscriptionStatus.ACTIVE, period_start_ms=1, period_end_ms=2
    )
    await tenants.create(TENANT)
    await tenants.update(ACME, lambda t: t.model_copy(update={"subscription": subscription}))
    assert (await tenants.get(ACME)).subscription == subscription


async def test_key_leads_to_its_tenant(tenants: Tenants) -> None:
    await tenants.create(TENANT)
    secret, key = new_key(ACME, 7, "ci", ("pirate",))
    await tenants.add_key(key)
    principal = await tenants.principal(secret)
    assert (principal.key, principal.tenant) == (key, TENANT)
    assert await tenants.keys(ACME) == [key]


@pytest.mark.parametrize(
    ("secret", "reason"),
    [
        ("", "missing"),
        ("sk-other", "malformed"),
        ("fbx_" + "a" * 500, "malformed"),
        ("fbx_ключ", "malformed"),
        ("fbx_" + "a" * 32, "unknown"),
    ],
)
async def test_bad_secret_is_refused_with_its_reason(tenants: Tenants, secret: str, reason: str) -> None:
    with pytest.raises(InvalidKey) as refused:
        await tenants.principal(secret)
    assert refused.value.reason == reason


async def test_expired_key_is_refused_although_it_is_cached(tenants: Tenants, clock: SteppedClock) -> None:
    await tenants.create(TENANT)
    secret, key = new_key(ACME, 0)
    await tenants.add_key(key.model_copy(update={"expires_at_ms": clock.now_ms + 1}))
    await tenants.principal(secret)
    clock.now_ms += 1
    with pytest.raises(InvalidKey, match="expired"):
        await tenants.principal(secret)


async def test_revocation_is_seen_everywhere_within_a_second(store: Redis) -> None:
    here, there = Tenants(store), Tenants(store)
    await here.create(TENANT)
    secret, key = new_key(ACME, 0)
    await here.add_key(key)
    await here.principal(secret)
    await there.principal(secret)
    revoked = await here.revoke_key(ACME, key.id)
    assert await here.revoke_key(ACME, key.id) == revoked
    with pytest.raises(InvalidKey, match="revoked"):
        await here.principal(secret)
    assert CACHE_S < 1
    await asyncio.sleep(CACHE_S)
    with pytest.raises(InvalidKey, match="revoked"):
        await there.principal(secret)


async def test_revoking_an_unknown_key_is_an_error(tenants: Tenants) -> None:
    await tenants.create(TENANT)
    with pytest.raises(UnknownKey):
        await tenants.revoke_key(ACME, "key_none")


async def test_suspended_tenant_is_refused(tenants: Tenants) -> None:
    await tenants.create(TENANT.model_copy(update={"suspended": True}))
    secret, key = new_key(ACME, 0)
    await tenants.add_key(key)
    with pytest.raises(TenantSuspended):
        await tenants.principal(secret)


async def test_cached_key_makes_no_round_trip(tenants: Tenants, store: Redis) -> None:
    await tenants.create(TENANT)
    secret, key = new_key(ACME, 0)
    await tenants.add_key(key)
    await tenants.principal(secret)
    await store.flushall()
    assert (await tenants.principal(secret)).key == key


@pytest.mark.parametrize("number", range(3))
async def test_tenant_killed_anywhere_still_gets_its_customer(
    store: Redis, tenants: Tenants, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    was_killed = await killed_before(monkeypatch, number, tenants.create(TENANT), directory)
    assert was_killed == (number < 2), "it writes twice"
    assert [one.id for one in await tenants.list()] == [ACME] * (number > 0)
    assert await tenants.customers_wanted() == [ACME] * (number > 0)


@pytest.mark.parametrize("number", range(4))
async def test_customer_killed_anywhere_is_set_by_the_next_try(
    tenants: Tenants, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    await tenants.create(TENANT)
    was_killed = await killed_before(monkeypatch, number, tenants.set_customer(ACME, "cus_1"), directory)
    assert was_killed == (number < 3), "it writes three times"
    assert await tenants.customers_wanted() == [ACME] * was_killed, "the periodic task tries again"
    await tenants.set_customer(ACME, "cus_1")
    found = await tenants.by_customer("cus_1")
    assert found is not None
    assert (found.dodo_customer_id, await tenants.customers_wanted()) == ("cus_1", [])


@pytest.mark.parametrize("number", range(2))
async def test_rotation_killed_anywhere_leaves_a_key_that_works_and_can_be_rotated(
    tenants: Tenants, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    await tenants.create(TENANT)
    secret, key = new_key(ACME, 7)
    await tenants.add_key(key)
    assert await killed_before(monkeypatch, number, tenants.rotate_key(ACME, key.id, 1_000), directory)
    assert (await tenants.principal(secret)).key.id == key.id
    fresh, _ = await tenants.rotate_key(ACME, key.id, 1_000)
    assert (await tenants.principal(fresh)).key.counts_as == key.id
    assert (await tenants.key(ACME, key.id)).expires_at_ms is not None
