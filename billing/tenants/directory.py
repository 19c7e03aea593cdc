"""Tenants and their API keys in the store, and the tenant that a request's key belongs to.

Each write is safe to repeat. An id is added to its list before the record is written, so that a crash in between hides
nothing.
"""

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from pydantic import ValidationError
from redis.asyncio import Redis

from billing.clock import Clock, now_ms
from billing.store import keys as names
from billing.store.compare_and_set import CompareAndSet
from billing.store.connection import guarded
from billing.store.keys import shard_for
from billing.store.write import write
from billing.tenants.errors import (
    CustomerTaken,
    InvalidKey,
    KeyNotRotated,
    TenantExists,
    TenantSuspended,
    UnknownKey,
    UnknownTenant,
)
from billing.tenants.tenant import (
    KEY_PREFIX,
    ApiKey,
    Principal,
    Scope,
    Tenant,
    check_scopes,
    hash_key,
    in_order,
    made_by,
    successor,
)
from billing.usage import TenantId

CACHE_S = 0.9
"""How long a process trusts a key it has looked up: a revocation takes effect everywhere within a second."""
MAX_CACHED = 20_000
SECRET_LENGTH_MAX = 128
LICENCE_LENGTH_MIN = 16
"""A shorter one could be guessed: it is not accepted."""
LIST_SILENCE_S = 5.0

log = logging.getLogger("farebox.billing.tenants.directory")


@dataclass(frozen=True, slots=True)
class _Seen:
    principal: Principal
    until: float
    """By the monotonic clock."""


class Tenants:
    """All tenants and keys. One per process: it keeps keys it has just seen."""

    def __init__(self, redis: Redis, clock: Clock = now_ms) -> None:
        self._redis = redis
        self._clock = clock
        self._tenants, self._keys = CompareAndSet(redis, Tenant), CompareAndSet(redis, ApiKey)
        self._seen: dict[str, _Seen] = {}

    async def create(self, tenant: Tenant) -> Tenant:
        """Add a tenant; until it has a Dodo customer it stands among those that want one.

        The very same tenant again is no error: the first reply may have been lost.

        Raises:
            TenantExists: the id is taken by another.
            CustomerTaken: its Dodo customer is another tenant's.
        """
        if tenant.dodo_customer_id:
            await self._claim(tenant.dodo_customer_id, tenant.id)
        if await self._store(tenant) != tenant:
            raise TenantExists(tenant.id)
        return tenant

    async def create_for_customer(self, tenant: Tenant) -> Tenant:
        """The tenant of this tenant's Dodo customer: the one that there is, or else this one, added now.

        One whose creation was cut off, or runs in another process, is completed under the id that it was begun with.

        Raises:
            TenantExists: the id is taken by a tenant that is another customer.
        """
        assert tenant.dodo_customer_id, "it is added for a customer"
        if await self.id_of_customer(tenant.dodo_customer_id) is None:
            other = await self._find(tenant.id)
            if other is not None and other.dodo_customer_id != tenant.dodo_customer_id:
                raise TenantExists(tenant.id)
        async with guarded():
            await write(self._redis, ("HSETNX", names.CUSTOMER_TENANTS, tenant.dodo_customer_id, tenant.id))
        begun = await self.id_of_customer(tenant.dodo_customer_id)
        return await self._store(tenant.model_copy(update={"id": begun}))

    async def _store(self, tenant: Tenant) -> Tenant:
        """Store a tenant unless its id is taken; what is stored then.

        It is put into the lists first, so that a crash in between leaves none that no list has.
        """
        listed = [names.TENANTS] if tenant.dodo_customer_id else [names.TENANTS, names.CUSTOMERS_WANTED]
        async with guarded():
            await write(
                self._redis,
                *(("SADD", name, tenant.id) for name in listed),
                ("SET", shard_for(tenant.id).tenant(tenant.id), tenant.model_dump_json(), "NX"),
            )
        stored = await self.get(tenant.id)
        await self._note_customer(stored)
        return stored

    async def _find(self, tenant_id: TenantId) -> Tenant | None:
        try:
            return await self.get(tenant_id)
        except UnknownTenant:
            return None

    async def get(self, tenant_id: TenantId) -> Tenant:
        """Raises: UnknownTenant."""
        return Tenant.model_validate_json(await self._text_of(tenant_id))

    async def update(self, tenant_id: TenantId, change: Callable[[Tenant], Tenant]) -> Tenant:
        """Replace a tenant by what ``change`` makes of it; ``change`` may be called several times.

        Raises:
            UnknownTenant: there is none of that id.
            StoreUnavailable: others kept changing it.
        """

        def keeping_its_id(old: Tenant) -> Tenant:
            new = change(old)
            assert new.id == old.id, "a tenant keeps its id"
            return new

        name = shard_for(tenant_id).tenant(tenant_id)
        tenant = await self._tenants.change(name, keeping_its_id, f"tenant {tenant_id}")
        if tenant is None:
            raise UnknownTenant(tenant_id)
        return tenant

    async def set_customer(self, tenant_id: TenantId, dodo_customer_id: str) -> Tenant:
        """Note which Dodo customer a tenant is.

        Raises:
            UnknownTenant: there is none of that id.
            CustomerTaken: another tenant is that customer.
        """
        await self._text_of(tenant_id)
        await self._claim(dodo_customer_id, tenant_id)
        tenant = await self.update(tenant_id, lambda t: t.model_copy(update={"dodo_customer_id": dodo_customer_id}))
        await self._note_customer(tenant)
        return tenant

    async def _note_customer(self, tenant: Tenant) -> None:
        async with guarded():
            await write(self._redis, ("SREM" if tenant.dodo_customer_id else "SADD", names.CUSTOMERS_WANTED, tenant.id))

    async def _claim(self, dodo_customer_id: str, tenant_id: TenantId) -> None:
        """A customer is one tenant's for ever, even where that tenant has a newer one: its payments still arrive."""
        async with guarded():
            await write(self._redis, ("HSETNX", names.CUSTOMER_TENANTS, dodo_customer_id, tenant_id))
            owner = str(await self._redis.hget(names.CUSTOMER_TENANTS, dodo_customer_id))
        if owner != tenant_id:
            raise CustomerTaken(dodo_customer_id, owner)

    async def by_customer(self, dodo_customer_id: str) -> Tenant | None:
        """``None`` also for one whose creation was cut off or still runs: ``create_for_customer`` completes it."""
        tenant_id = await self.id_of_customer(dodo_customer_id)
        return await self._find(tenant_id) if tenant_id else None

    async def id_of_customer(self, dodo_customer_id: str) -> TenantId | None:
        """The id of a customer's tenant, or of the one that is being created for it."""
        async with guarded():
            tenant_id = await self._redis.hget(names.CUSTOMER_TENANTS, dodo_customer_id)
        return TenantId(str(tenant_id)) if tenant_id else None

    async def customers_wanted(self) -> list[TenantId]:
        """Tenants that no Dodo customer is known for, by id."""
        async with guarded(LIST_SILENCE_S):
            return [TenantId(str(i)) for i in sorted(await self._redis.smembers(names.CUSTOMERS_WANTED))]

    async def add_key(self, key: ApiKey) -> None:
        """One that is there stays as it is: who adds it late does not undo its end.

        Raises:
            UnknownTenant: there is none of that id.
            ScopesRefused: its scopes do not go with its bounds.
        """
        check_scopes(key)
        await self._text_of(key.tenant)
        async with guarded():
            await write(
                self._redis,
                ("SADD", shard_for(key.tenant).keys_of(key.tenant), key.hash),
                ("SET", names.api_key(key.hash), key.model_dump_json(), "NX"),
            )

    async def keys(self, tenant_id: TenantId) -> list[ApiKey]:
        """All keys of a tenant, revoked ones too, oldest first."""
        async with guarded(LIST_SILENCE_S):
            hashes = sorted(await self._redis.smembers(shard_for(tenant_id).keys_of(tenant_id)))
            texts = await _get_all(self._redis, [names.api_key(str(digest)) for digest in hashes])
        found = [ApiKey.model_validate_json(text) for text in texts if text]
        return sorted(found, key=lambda key: (key.created_at_ms, key.id))

    async def revoke_key(self, tenant_id: TenantId, key_id: str) -> ApiKey:
        """End a key for good, everywhere within a second. Revoked again it keeps its first time.

        Raises:
            UnknownKey: the tenant has none of that id.
        """
        now = self._clock()
        return await self.change_key(
            tenant_id, key_id, lambda key: key if key.revoked_at_ms else key.model_copy(update={"revoked_at_ms": now})
        )

    async def expire_key(self, tenant_id: TenantId, key_id: str, at_ms: int) -> ApiKey:
        """Let a key end at a moment, unless it ends before it anyway. Repeated, it keeps the first moment.

        Raises:
            UnknownKey: the tenant has none of that id.
        """

        def ending(key: ApiKey) -> ApiKey:
            ends_before = key.expires_at_ms is not None and key.expires_at_ms <= at_ms
            return key if key.revoked_at_ms or ends_before else key.model_copy(update={"expires_at_ms": at_ms})

        return await self.change_key(tenant_id, key_id, ending)

    async def rotate_key(
        self, tenant_id: TenantId, key_id: str, grace_ms: int, maker: ApiKey | None = None
    ) -> tuple[str, ApiKey]:
        """A new secret for a key; the old one works for the grace that is given.

        ``maker`` is the key that rotates it; ``None`` is the operator.

        Raises:
            UnknownKey: the tenant has none of that id.
            KeyNotRotated: it has ended, or is a licence key.
            ScopeMissing: it may do more than its maker.
        """
        old, now = await self.key(tenant_id, key_id), self._clock()
        if not old.is_usable(now) or not old.is_ours:
            raise KeyNotRotated(key_id, "it has ended" if old.is_ours else "Dodo made it and replaces it")
        secret, made = successor(old, now)
        made = made if maker is None else made_by(maker, made)
        await self.add_key(made)
        await self.expire_key(tenant_id, key_id, now + grace_ms)
        return secret, made

    async def set_scopes(self, tenant_id: TenantId, key_id: str, scopes: Iterable[Scope]) -> ApiKey:
        """Let a key be used for these and nothing else, everywhere within a second.

        Raises:
            UnknownKey: the tenant has none of that id.
            ScopesRefused: they do not go with its bounds.
        """
        wanted = in_order(scopes)

        def changed(key: ApiKey) -> ApiKey:
            new = key.model_copy(update={"scopes": wanted})
            check_scopes(new)
            return new

        return await self.change_key(tenant_id, key_id, changed)

    async def lift_key(self, tenant_id: TenantId, key_id: str) -> ApiKey:
        """Lift a key's throttle; it is not throttled again for a day. Raises UnknownKey."""
        lifted = {"throttled": None, "lifted_at_ms": self._clock()}
        return await self.change_key(
            tenant_id, key_id, lambda key: key.model_copy(update=lifted) if key.throttled else key
        )

    async def change_key(self, tenant_id: TenantId, key_id: str, change: Callable[[ApiKey], ApiKey]) -> ApiKey:
        """Replace a key by what ``change`` makes of it, everywhere within a second; it may be called several times.

        Raises:
            UnknownKey: the tenant has none of that id.
            StoreUnavailable: others kept changing it.
        """

        def keeping_its_identity(old: ApiKey) -> ApiKey:
            new = change(old)
            assert (new.id, new.hash, new.tenant) == (old.id, old.hash, old.tenant), "a key keeps its identity"
            return new

        found = await self.key(tenant_id, key_id)
        name = names.api_key(found.hash)
        self._seen.pop(found.hash, None)
        key = await self._keys.change(name, keeping_its_identity, f"key {key_id}")
        self._seen.pop(found.hash, None)
        if key is None:
            raise UnknownKey(key_id)
        return key

    async def key(self, tenant_id: TenantId, key_id: str) -> ApiKey:
        """Raises UnknownKey."""
        key = next((key for key in await self.keys(tenant_id) if key.id == key_id), None)
        if key is None:
            raise UnknownKey(key_id)
        return key

    async def principal(self, secret: str) -> Principal:
        """The key and tenant that this secret belongs to.

        Raises:
            InvalidKey: it is missing, malformed, unknown, revoked or expired.
            TenantSuspended: its tenant may not use anything.
            StoreUnavailable: the store does not answer.
        """
        _check_form(secret)
        digest, now = hash_key(secret), time.monotonic()
        seen = self._seen.get(digest)
        if seen is None or now >= seen.until:
            seen = _Seen(await self._look_up(digest), now + CACHE_S)
            self._remember(digest, seen)
        _check_usable(seen.principal, self._clock())
        return seen.principal

    async def _look_up(self, digest: str) -> Principal:
        async with guarded():
            text = await self._redis.get(names.api_key(digest))
        if text is None:
            raise InvalidKey("unknown")
        key = ApiKey.model_validate_json(text)
        try:
            return Principal(key, await self.get(key.tenant))
        except UnknownTenant:
            raise InvalidKey("unknown") from None

    def _remember(self, digest: str, seen: _Seen) -> None:
        if len(self._seen) >= MAX_CACHED:
            self._seen.clear()
        self._seen[digest] = seen

    async def _text_of(self, tenant_id: TenantId) -> str:
        async with guarded():
            text = await self._redis.get(shard_for(tenant_id).tenant(tenant_id))
        if text is None:
            raise UnknownTenant(tenant_id)
        return str(text)

    async def list_readable(self) -> tuple[list[Tenant], tuple[TenantId, ...]]:
        """All tenants by id, and the ids of those whose record this version cannot read."""
        found: list[Tenant] = []
        unreadable: list[TenantId] = []
        for tenant_id, text in await self._texts():
            try:
                found.append(Tenant.model_validate_json(text))
            except ValidationError as error:
                unreadable.append(tenant_id)
                log.error("tenant %s cannot be read: %s", tenant_id, error)
        return found, tuple(unreadable)

    async def _texts(self) -> list[tuple[TenantId, str]]:
        """Every tenant's record as it is stored, by id."""
        async with guarded(LIST_SILENCE_S):
            ids = sorted(TenantId(str(one)) for one in await self._redis.smembers(names.TENANTS))
            texts = await _get_all(self._redis, [shard_for(one).tenant(one) for one in ids])
        return [(tenant_id, text) for tenant_id, text in zip(ids, texts, strict=True) if text]

    async def list(self) -> list[Tenant]:
        """All tenants by id, without those whose record this version cannot read."""
        return (await self.list_readable())[0]


async def _get_all(redis: Redis, keys: list[str]) -> list[str | None]:
    pipe = redis.pipeline(transaction=False)
    for key in keys:
        pipe.get(key)
    return list(await pipe.execute()) if keys else []


def _check_form(secret: str) -> None:
    if not secret:
        raise InvalidKey("missing")
    is_ours_or_a_licence = secret.startswith(KEY_PREFIX) or len(secret) >= LICENCE_LENGTH_MIN
    is_written_well = len(secret) <= SECRET_LENGTH_MAX and secret.isascii() and secret.isprintable()
    if not is_ours_or_a_licence or not is_written_well or " " in secret:
        raise InvalidKey("malformed")


def _check_usable(principal: Principal, now: int) -> None:
    key = principal.key
    if key.revoked_at_ms is not None:
        raise InvalidKey("revoked")
    if not key.is_usable(now):
        raise InvalidKey("expired")
    if principal.tenant.suspended:
        raise TenantSuspended(principal.tenant.id)
