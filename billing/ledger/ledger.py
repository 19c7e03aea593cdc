"""The ledger: every movement of a tenant's credit, each one atomic step in the store.

Knows which script makes which movement; decides nothing that the scripts decide. Every method
may be called again with the same id after a lost reply: it then tells what the first call did.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import cast

from redis.asyncio import Redis
from redis.commands.core import AsyncScript

from billing.clock import Clock, now_ms
from billing.ledger.account import (
    Account,
    Adjustment,
    Clawback,
    Funding,
    Grant,
    Hold,
    HoldRequest,
    Movement,
    Progress,
    Receipt,
    Repayment,
    Restoration,
    Settlement,
    out_of_bounds,
)
from billing.ledger.codec import (
    letter_of,
    pack_hold,
    pack_usage,
    pairs,
    tenant_in,
    unpack_account,
    unpack_allowance,
    unpack_extension,
    unpack_hold,
)
from billing.ledger.errors import DuplicateRequest, GrantRefused, SourceReused, UnknownHold
from billing.ledger.recovery import Recovery
from billing.money import MAX_BALANCE_NANOS, MAX_GRANT_NANOS, Nanos
from billing.store.connection import guarded, replicated
from billing.store.keys import ALL_SHARDS, Shard, shard_for, shard_of
from billing.store.scripts import source
from billing.usage import NOTHING, RequestId, Status, TenantId, UsageRecord

MARKER_WINDOW_MS = 3_600_000
"""A settled request id is remembered for at least two of these."""
MOVEMENT_TTL_MS = 400 * 24 * 3_600_000
"""How long a payment's or refund's id is remembered: longer than Dodo could send it again."""
SWEEP_SILENCE_S = 2.0
"""For work that no client waits for."""


class Ledger:
    """Holds, settlements, grants and clawbacks of all tenants."""

    def __init__(
        self,
        redis: Redis,
        clock: Clock = now_ms,
        marker_window_ms: int = MARKER_WINDOW_MS,
        on_done: Callable[[Movement], None] | None = None,
        clocks_may_differ_ms: int = 0,
    ) -> None:
        """``on_done`` hears of every movement that the store acknowledged.

        ``clocks_may_differ_ms``: how far ``clock`` may be from the store's own; 0 takes any calendar as it is.
        """
        self._redis = redis
        self._on_done = on_done
        self.recovery = Recovery(redis, clock, marker_window_ms)
        self._clock = clock
        self._window_ms, self._may_differ_ms = marker_window_ms, clocks_may_differ_ms
        self._hold = redis.register_script(source("ledger/hold"))
        self._extend = redis.register_script(source("ledger/extend"))
        self._settle = redis.register_script(source("ledger/settle"))
        self._checkpoint = redis.register_script(source("ledger/checkpoint"))
        self._expire = redis.register_script(source("ledger/expire"))
        self._grant = redis.register_script(source("ledger/grant"))
        self._claw_back = redis.register_script(source("ledger/claw_back"))
        self._adjust = redis.register_script(source("ledger/adjust"))
        self._restore = redis.register_script(source("ledger/restore"))
        self._repay = redis.register_script(source("ledger/repay"))
        self._account = redis.register_script(source("ledger/account"))

    async def hold(self, request: HoldRequest) -> Hold:
        """Admit a request and set its prompt and first step of output aside.

        The same request again, while its hold is open, returns that hold.

        Raises:
            RateLimited: a limit of its key is reached.
            InsufficientCredits: not even its shortest answer is affordable.
            CreditOnHold: it would be, were other requests settled.
            SpendCapReached: its key has spent what it may.
            DuplicateRequest: the id stands for another hold, or was settled.
            StoreUnavailable: nothing may run; a ClockAstray where calendar and store differ.
        """
        return await self._ask_for(request, is_preview=False)

    async def preview(self, request: HoldRequest) -> Hold:
        """What ``hold`` would answer now, with the same refusals; changes nothing."""
        return await self._ask_for(request, is_preview=True)

    async def _ask_for(self, request: HoldRequest, is_preview: bool) -> Hold:
        shard, tenant = shard_for(request.tenant), request.tenant
        names = [shard.account(tenant), shard.buckets(tenant), shard.retired(tenant), shard.holds, shard.leases]
        names += [shard.limits(tenant), shard.slots(tenant, request.counted_key), *shard.settled]
        calendar_ms = self._clock()
        arguments = [*pack_hold(request, calendar_ms, self._window_ms, is_preview), str(self._may_differ_ms)]
        async with guarded():
            reply = cast(list[str], await self._hold(keys=names, args=arguments))
        return unpack_hold(request, reply, calendar_ms)

    async def extend(self, request: HoldRequest, total_nanos: Nanos, least_nanos: Nanos) -> Nanos:
        """Raise an open hold to a total, or as near to it as the credit allows, at the price it was made at.

        Returns:
            What the hold has now: at least ``least_nanos``, unless a bucket of requests pays for it.

        Raises:
            InsufficientCredits, CreditOnHold, SpendCapReached: not even the least is there; nothing has changed.
            UnknownHold: it was settled, or its lease ended.
            StoreUnavailable: whether it took effect is unknown; extend again, or settle.
        """
        shard, tenant = shard_for(request.tenant), request.tenant
        names = [shard.account(tenant), shard.buckets(tenant), shard.holds]
        calendar_ms = self._clock()
        arguments: list[str | int] = [request.request_id, tenant, total_nanos, least_nanos, calendar_ms]
        async with guarded():
            reply = cast(list[str], await self._extend(keys=names, args=arguments))
        return unpack_extension(request, reply, least_nanos, calendar_ms)

    async def checkpoint(self, progress: Sequence[Progress]) -> frozenset[RequestId]:
        """Renew the leases of running requests and note what each has cost so far.

        Returns:
            Ids that are no longer held: what they generate from here on is nobody's.

        Raises:
            StoreUnavailable: some or all leases were not renewed.
        """
        by_shard: defaultdict[int, list[str]] = defaultdict(list)
        for one in progress:
            by_shard[shard_of(one.tenant)] += [one.request_id, pack_usage(one.usage), str(one.list_nanos)]
        gone: set[RequestId] = set()
        async with guarded(SWEEP_SILENCE_S):
            for number, arguments in by_shard.items():
                shard = Shard(number)
                gone |= set(await self._checkpoint(keys=[shard.holds, shard.leases], args=arguments))
        return frozenset(gone)

    async def settle(self, settlement: Settlement) -> Receipt:
        """Charge what was served, at most the hold, and free the rest; the record is durable on return.

        Raises:
            UnknownHold: the id was never held, or was settled longer ago than is remembered.
            DuplicateRequest: it was settled, and its record has been archived since.
            Quarantined: the store has lost the hold, and nobody can be sure that it was not charged.
            StoreUnavailable: whether it took effect is unknown; settle again.
        """
        receipt = await self._settle_known(settlement)
        if receipt is None:
            receipt = await self.recovery.settle(settlement) or await self._settle_known(settlement)
        if receipt is None:
            raise UnknownHold(settlement.request_id)
        await self._acknowledge(settlement)
        return receipt

    async def _settle_known(self, settlement: Settlement) -> Receipt | None:
        shard, tenant = shard_for(settlement.tenant), settlement.tenant
        arguments: list[str | int] = [settlement.request_id, tenant, settlement.status]
        arguments += [pack_usage(settlement.usage), settlement.list_nanos, self._clock(), self._window_ms]
        arguments += [settlement.origin.held if settlement.origin else 0]
        async with guarded():
            reply = cast(list[str], await self._settle(keys=shard.settling(tenant), args=arguments))
        if reply[0] == "unknown":
            return None
        if reply[0] == "duplicate":
            raise DuplicateRequest(settlement.request_id)
        return Receipt(UsageRecord.from_json(reply[1]), is_repeat=reply[0] == "repeat")

    async def _acknowledge(self, movement: Movement) -> None:
        """Nobody is told before enough replicas have it."""
        await replicated(self._redis, shard_for(movement.tenant).pulse)
        if self._on_done is not None:
            self._on_done(movement)

    async def void(self, request_id: RequestId, tenant: TenantId) -> None:
        """Free a hold under which nothing was served; the record says so and charges nothing."""
        await self.settle(Settlement(request_id, tenant, NOTHING, Nanos(0), Status.FAILED))

    async def expire(self, limit: int = 100) -> int:
        """Bill the last checkpoint of up to ``limit`` holds whose lease has ended; how many. Any process may."""
        expired = 0
        for shard, request_id, tenant in await self._overdue(limit):
            arguments: list[str | int] = [request_id, self._clock(), self._window_ms]
            async with guarded():
                expired += int(await self._expire(keys=shard.settling(tenant), args=arguments))
        return expired

    async def _overdue(self, limit: int) -> list[tuple[Shard, RequestId, TenantId]]:
        async with guarded(SWEEP_SILENCE_S):
            seconds, microseconds = await self._redis.time()
            now = seconds * 1000 + microseconds // 1000
            pipe = self._redis.pipeline(transaction=False)
            for shard in ALL_SHARDS:
                pipe.zrangebyscore(shard.leases, "-inf", now, start=0, num=limit)
            found = [(s, i) for s, ids in zip(ALL_SHARDS, await pipe.execute(), strict=True) for i in ids][:limit]
            pipe = self._redis.pipeline(transaction=False)
            for shard, request_id in found:
                pipe.hget(shard.holds, request_id)
            holds = await pipe.execute() if found else []
        return [(s, RequestId(i), tenant_in(h)) for (s, i), h in zip(found, holds, strict=True) if h]

    async def open_holds(self) -> int:
        """Holds of all tenants that are not settled yet."""
        async with guarded(SWEEP_SILENCE_S):
            pipe = self._redis.pipeline(transaction=False)
            for shard in ALL_SHARDS:
                pipe.hlen(shard.holds)
            return sum(await pipe.execute())

    async def grant(self, grant: Grant) -> bool:
        """Fill a bucket, once per source.

        Returns:
            False where this source was granted before.

        Raises:
            GrantRefused: nothing, or more than one account may hold.
            SourceReused: the source stands for another movement.
        """
        if not 0 < grant.amount <= MAX_GRANT_NANOS:
            raise GrantRefused(grant.source, out_of_bounds(grant.unit, grant.amount))
        shard, tenant = shard_for(grant.tenant), grant.tenant
        names = [shard.account(tenant), shard.buckets(tenant), shard.stream, shard.movement(tenant, grant.source)]
        arguments: list[str | int] = [tenant, grant.source, letter_of(grant.unit), grant.amount]
        arguments += [grant.expires_at_ms or 0, ",".join(grant.adapters)]
        is_new = await self._move(self._grant, grant.source, names, arguments) != "repeat"
        await self._acknowledge(grant)
        return is_new

    async def claw_back(self, clawback: Clawback) -> int:
        """Take back what an earlier grant gave, once per source; before that grant, it waits for it.

        Returns:
            Units taken by the first call with this source; 0 where it waits.

        Raises:
            GrantRefused: ``granted_by`` filled no bucket.
            SourceReused: the source stands for another movement.
        """
        if clawback.amount <= 0:
            raise GrantRefused(clawback.source, f"{clawback.amount} units cannot be taken back")
        shard, tenant = shard_for(clawback.tenant), clawback.tenant
        names = [shard.account(tenant), shard.buckets(tenant), shard.retired(tenant), shard.stream]
        names += [shard.movement(tenant, clawback.source), shard.movement(tenant, clawback.granted_by)]
        arguments: list[str | int] = [tenant, clawback.source, clawback.granted_by, clawback.amount]
        reply = await self._move(self._claw_back, clawback.source, names, arguments)
        if reply == "not_a_bucket":
            raise GrantRefused(clawback.source, f"{clawback.granted_by} filled no bucket")
        await self._acknowledge(clawback)
        return int(reply)

    async def restore(self, clawback: Clawback) -> int:
        """Give back what an earlier clawback took, once; what it still waits to take it will not.

        Returns:
            Units given back by the first call.

        Raises:
            GrantRefused: there was no such clawback.
            SourceReused: the restoration's source stands for another movement.
        """
        shard, tenant, source = shard_for(clawback.tenant), clawback.tenant, f"restore:{clawback.source}"
        names = [shard.account(tenant), shard.buckets(tenant), shard.retired(tenant), shard.stream]
        names += [shard.movement(tenant, name) for name in (source, clawback.source, clawback.granted_by)]
        reply = await self._move(self._restore, source, names, [tenant, source, clawback.source, clawback.granted_by])
        if reply == "unknown":
            raise GrantRefused(source, f"{clawback.source} took nothing back")
        await self._acknowledge(Restoration(clawback))
        return int(reply)

    async def adjust(self, adjustment: Adjustment) -> bool:
        """Correct what a tenant has, up or down, once per source.

        Returns:
            False where this source was counted before.

        Raises:
            GrantRefused: nothing, or more than can be counted exactly.
            SourceReused: the source stands for another movement.
        """
        if not 0 < abs(adjustment.amount) <= MAX_GRANT_NANOS:
            raise GrantRefused(adjustment.source, out_of_bounds(adjustment.unit, adjustment.amount))
        shard, tenant = shard_for(adjustment.tenant), adjustment.tenant
        names = [shard.account(tenant), shard.buckets(tenant), shard.stream, shard.movement(tenant, adjustment.source)]
        arguments: list[str | int] = [tenant, adjustment.source, letter_of(adjustment.unit), adjustment.amount]
        arguments += [adjustment.reason]
        is_new = await self._move(self._adjust, adjustment.source, names, arguments) != "repeat"
        await self._acknowledge(adjustment)
        return is_new

    async def repay_overage(self, source: str, tenant: TenantId, nanos: int) -> bool:
        """Lower settled exposure when the payment that bills it succeeded, once per source.

        Returns:
            False where this source was counted before.
        """
        assert nanos >= 0, "a payment is not negative"
        shard = shard_for(tenant)
        names = [shard.account(tenant), shard.buckets(tenant), shard.stream, shard.movement(tenant, source)]
        reply = await self._move(self._repay, source, names, [tenant, source, nanos])
        await self._acknowledge(Repayment(source, tenant, nanos))
        return reply != "repeat"

    async def _move(
        self, script: AsyncScript, source: str, names: Sequence[str], arguments: Sequence[str | int]
    ) -> str:
        """One movement of credit by its own id. Raises SourceReused, GrantRefused."""
        async with guarded():
            reply = await script(keys=names, args=[*arguments, self._clock(), MOVEMENT_TTL_MS, MAX_BALANCE_NANOS])
        if reply == "reused":
            raise SourceReused(source)
        if reply == "too_much":
            raise GrantRefused(source, "the account would hold more than can be counted exactly")
        return str(reply)

    async def spent(self, tenant: TenantId, month_start_ms: int) -> Nanos:
        """What the tenant's requests held in that month were charged so far."""
        async with guarded():
            month, spent = await self._redis.hmget(shard_for(tenant).account(tenant), ["month", "spent"])
        return Nanos(int(spent or 0)) if month == str(month_start_ms) else Nanos(0)

    async def account(self, tenant: TenantId, funding: Funding | None = None) -> Account:
        """The account as of now, without buckets that expired with nothing owed; ``funding``: as a hold finds it."""
        shard, given = shard_for(tenant), funding.allowance if funding else None
        names = [shard.account(tenant), shard.buckets(tenant), shard.retired(tenant)]
        async with guarded():
            numbers, flat, retired = await self._account(keys=names, args=[given.id if given else ""])
        found = unpack_account(tenant, numbers, pairs(flat), self._clock())
        kept = unpack_allowance(given, pairs(flat).get(given.id) or retired) if given else None
        return found if funding is None else found.beside(kept)
