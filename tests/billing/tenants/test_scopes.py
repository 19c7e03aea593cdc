"""What a key may be used for: in records from before there were scopes, and beside its bounds."""

import json

import pytest
from redis.asyncio import Redis

from billing.catalog.plans import Limits
from billing.money import Nanos
from billing.store import keys as names
from billing.tenants.directory import Tenants
from billing.tenants.errors import ScopesRefused
from billing.tenants.tenant import BILLING, BUYER_SCOPES, NEW_KEY_SCOPES, ApiKey, Scope, Tenant, new_key
from tests.support.samples import ACME

WRITTEN_BEFORE = ("scopes", "made_by")


@pytest.fixture
async def tenants(store: Redis) -> Tenants:
    tenants = Tenants(store)
    await tenants.create(Tenant(id=ACME, email="ops@acme.test", plan="prepaid", created_at_ms=1))
    return tenants


@pytest.mark.parametrize(
    ("bounds", "scopes"),
    [
        ({}, BUYER_SCOPES),
        ({"models": None, "limits": Limits().model_dump(), "daily_cap": None, "monthly_cap": None}, BUYER_SCOPES),
        ({"manages_keys": True}, tuple(Scope)),
        ({"manages_keys": False}, BUYER_SCOPES),
        ({"expires_at_ms": 2**52}, BUYER_SCOPES),
        ({"daily_cap": "0"}, NEW_KEY_SCOPES),
        ({"daily_cap": "0.01"}, NEW_KEY_SCOPES),
        ({"monthly_cap": "50.00"}, NEW_KEY_SCOPES),
        ({"models": []}, NEW_KEY_SCOPES),
        ({"models": ["pirate"], "manages_keys": True}, NEW_KEY_SCOPES),
        ({"limits": {"requests_per_minute": 3}}, NEW_KEY_SCOPES),
    ],
)
async def test_key_of_before_keeps_what_its_bounds_allow(
    tenants: Tenants, store: Redis, bounds: dict[str, object], scopes: tuple[Scope, ...]
) -> None:
    secret, key = new_key(ACME, 0)
    await tenants.add_key(key)
    written = key.model_dump(mode="json", exclude=set(WRITTEN_BEFORE)) | {"manages_keys": False} | bounds
    await store.set(names.api_key(key.hash), json.dumps(written))
    read = (await tenants.principal(secret)).key
    assert (read.scopes, read.made_by) == (scopes, "")
    assert read.manages_keys is (Scope.KEYS_WRITE in scopes)
    changed = await tenants.change_key(ACME, key.id, lambda one: one.model_copy(update={"name": "x"}))
    assert (await tenants.key(ACME, key.id)).scopes == changed.scopes == scopes, "written back, they stay"


async def test_new_key_has_the_first_two_scopes(tenants: Tenants) -> None:
    secret, key = new_key(ACME, 0)
    await tenants.add_key(key)
    read = (await tenants.principal(secret)).key
    assert (read, read.scopes, read.made_by) == (key, NEW_KEY_SCOPES, "admin")


def bounded(scopes: tuple[Scope, ...], **bounds: object) -> ApiKey:
    return new_key(ACME, 0, scopes=scopes)[1].model_copy(update=bounds)


@pytest.mark.parametrize("scope", Scope)
@pytest.mark.parametrize(
    ("bounds", "refused"),
    [
        ({}, ()),
        ({"expires_at_ms": 5}, ()),
        ({"daily_cap": Nanos(1)}, (Scope.KEYS_WRITE, *BILLING)),
        ({"monthly_cap": Nanos(0)}, (Scope.KEYS_WRITE, *BILLING)),
        ({"models": ("pirate",)}, (Scope.KEYS_WRITE,)),
        ({"limits": Limits(concurrent_requests=1)}, (Scope.KEYS_WRITE,)),
    ],
)
async def test_scope_refused_where_bounds_would_be_worthless(
    tenants: Tenants, scope: Scope, bounds: dict[str, object], refused: tuple[Scope, ...]
) -> None:
    given, plain = bounded((scope,), **bounds), bounded(NEW_KEY_SCOPES, **bounds)
    await tenants.add_key(plain)
    if scope in refused:
        with pytest.raises(ScopesRefused, match=scope.value):
            await tenants.add_key(given)
        with pytest.raises(ScopesRefused, match=scope.value):
            await tenants.set_scopes(ACME, plain.id, [scope])
        assert [key.scopes for key in await tenants.keys(ACME)] == [NEW_KEY_SCOPES]
    else:
        await tenants.add_key(given)
        assert (await tenants.set_scopes(ACME, plain.id, [scope, scope])).scopes == (scope,)


async def test_rotated_key_keeps_its_scopes(tenants: Tenants) -> None:
    _, key = new_key(ACME, 0, scopes=(Scope.BILLING_WRITE, Scope.INFERENCE))
    await tenants.add_key(key.model_copy(update={"made_by": "key_other"}))
    _, made = await tenants.rotate_key(ACME, key.id, 0)
    assert (made.scopes, made.made_by) == ((Scope.INFERENCE, Scope.BILLING_WRITE), "admin")
