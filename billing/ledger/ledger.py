"""The ledger: every movement of a tenant's credit, each one atomic step in the store.

The scripts decide; ``README.md`` beside this file says which one makes which movement. Every method may be called again
with the same id after a lost reply: it then answers what the first call did.
"""

import logging
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

from redis.asyncio import Redis
from redis.exceptions import ResponseError

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
    pack_bucket,
    pack_funding,
    pack_hold,
    pack_usage,
    tenant_in,
    unpack_account,
    unpack_extension,
    unpack_hold,
)
from billing.ledger.errors import DuplicateRequest, GrantRefused, SourceReused, UnknownHold
from billing.ledger.recovery import Recovery
from billing.money import MAX_BALANCE_NANOS, MAX_GRANT_NANOS, Nanos
from billing.store.connection import guarded, replicated
from billing.store.keys import ALL_SHARDS, Shard, shard_for, shard_of
from billing.store.scripts import Argument, Reply, Script
from billing.usage import NOTHING, RequestId, Status, TenantId, UsageRecord

MARKER_WINDOW_MS = 3_600_000
"""A settled request id is remembered for at least two of these."""
MOVEMENT_TTL_MS = 400 * 24 * 3_600_000
"""How long a payment's or refund's id is remembered: longer than Dodo could send it again."""
SWEEP_SILENCE_S = 2.0
"""For work that no client waits for."""

logger = logging.getLogger(__name__)


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
        """``on_done`` gets every movement that the store acknowledged.

        ``clocks_may_differ_ms``: how far ``clock`` may be from the store's own; 0 accepts any difference.
        """
        self._redis = redis
        self._on_done = on_done
        self.recovery = Recovery(redis, clock, marker_window_ms)
        self._clock = clock
        self._window_ms, self._may_differ_ms = marker_window_ms, clocks_may_differ_ms
        self._damaged: set[RequestId] = set()
        self._hold = Script(redis, "ledger/hold")
        self._extend = Script(redis, "ledger/extend")
        self._settle = Script(redis, "ledger/settle")
        self._checkpoint = Script(redis, "ledger/checkpoint")
        self._expire = Script(redis, "ledger/expire")
        self._grant = Script(redis, "ledger/grant")
        self._claw_back = Script(redis, "ledger/claw_back")
        self._restore = Script(redis, "ledger/restore")
        self._repay = Script(redis, "ledger/repay")
        self._account = Script(redis, "ledger/account")

    async def hold(self, request: HoldRequest) -> Hold:
        """Admit a request and set its prompt and first step of output aside.

        The same request again, while its hold is open, returns that hold.

        Raises:
            RateLimited: a limit of its key is reached.
            InsufficientCredits: not even its shortest answer is affordable.
            CreditOnHold: it would be, were other requests settled.
            SpendCapReached: its key has spent what it may.
            DuplicateRequest: the id stands for another hold, or was settled.
            StoreUnavailable: nothing may run; a ClockSkewError where this clock and the store's differ by too much.
        """
        return await self._ask_for(request, is_preview=False)

    async def preview(self, request: HoldRequest) -> Hold:
        """What ``hold`` would answer now, with the same refusals; changes nothing."""
        return await self._ask_for(request, is_preview=True)

    async def _ask_for(self, request: HoldRequest, is_preview: bool) -> Hold:
        shard, tenant, gateway_now = shard_for(request.tenant), request.tenant, self._clock()
        async with guarded():
            reply = await self._hold.reply(
                keys={
                    "account": shard.account(tenant),
                    "buckets": shard.buckets(tenant),
                    "retired": shard.retired(tenant),
                    "holds": shard.holds,
                    "leases": shard.leases,
                    "limits": shard.limits(tenant),
                    "slots": shard.slots(tenant, request.counted_key),
                    "settled": shard.settled,
                },
                args={
                    **pack_hold(request),
                    "gateway_now": gateway_now,
                    "window": self._window_ms,
                    "is_preview": is_preview,
                    "may_differ": self._may_differ_ms,
                },
            )
        return unpack_hold(request, reply, gateway_now)

    async def extend(self, request: HoldRequest, total_nanos: Nanos, least_nanos: Nanos) -> Nanos:
        """Raise an open hold to a total, or as near to it as the credit allows, at the price it was made at.

        Returns:
            What the hold has now: at least ``least_nanos``, unless a bucket of requests pays for it.

        Raises:
            InsufficientCredits, CreditOnHold, SpendCapReached: not even the least is there; nothing has changed.
            UnknownHold: it was settled, or its lease ended.
            StoreUnavailable: whether it took effect is unknown; extend again, or settle.
        """
        shard, tenant, gateway_now = shard_for(request.tenant), request.tenant, self._clock()
        async with guarded():
            reply = await self._extend.reply(
                keys={"account": shard.account(tenant), "buckets": shard.buckets(tenant), "holds": shard.holds},
                args={
                    "id": request.request_id,
                    "tenant": tenant,
                    "total": total_nanos,
                    "least": least_nanos,
                    "gateway_now": gateway_now,
                },
            )
        return unpack_extension(request, reply, least_nanos, gateway_now)

    async def checkpoint(self, progress: Sequence[Progress]) -> frozenset[RequestId]:
        """Renew the leases of running requests and note what each has cost so far.

        Returns:
            Ids that are no longer held: what they generate from here on is not paid for.

        Raises:
            StoreUnavailable: some or all leases were not renewed.
        """
        by_shard: defaultdict[int, list[tuple[str, str, int, int]]] = defaultdict(list)
        for one in progress:
            row = (one.request_id, pack_usage(one.usage), one.list_nanos, one.held_nanos)
            by_shard[shard_of(one.tenant)].append(row)
        gone: set[RequestId] = set()
        async with guarded(SWEEP_SILENCE_S):
            for number, rows in by_shard.items():
                shard = Shard(number)
                reply = await self._checkpoint.reply(
                    keys={"holds": shard.holds, "leases": shard.leases}, args={"requests": rows}
                )
                gone |= {RequestId(request_id) for (request_id,) in reply.rows}
        return frozenset(gone)

    async def settle(self, settlement: Settlement) -> Receipt:
        """Charge what was served, at most the hold, and free the rest; the record is durable on return.

        Raises:
            UnknownHold: the id was never held, or was settled longer ago than is remembered.
            DuplicateRequest: it was settled, and its record has been archived since.
            UnresolvedSettlement: the store has lost the hold, and it is not sure that it was never charged.
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
        async with guarded():
            reply = await self._settle.reply(
                keys=_ending_keys(shard_for(settlement.tenant), settlement.tenant),
                args={
                    "id": settlement.request_id,
                    "tenant": settlement.tenant,
                    "status": settlement.status.value,
                    "usage": pack_usage(settlement.usage),
                    "list": settlement.list_nanos,
                    "held": settlement.snapshot.held if settlement.snapshot else 0,
                    "gateway_now": self._clock(),
                    "window": self._window_ms,
                },
            )
        if reply.state == "unknown":
            return None
        if reply.state == "duplicate":
            raise DuplicateRequest(settlement.request_id)
        return Receipt(UsageRecord.from_json(reply["record"]), is_repeat=reply.state == "repeat")

    async def _acknowledge(self, movement: Movement) -> None:
        """Wait until enough replicas have it: only then does its sender get an answer."""
        await replicated(self._redis, shard_for(movement.tenant).pulse)
        if self._on_done is not None:
            self._on_done(movement)

    async def void(self, request_id: RequestId, tenant: TenantId) -> None:
        """Free a hold under which nothing was served; the record says so and charges nothing."""
        await self.settle(Settlement(request_id, tenant, NOTHING, Nanos(0), Status.FAILED))

    async def expire(self, limit: int = 100) -> int:
        """Bill the last checkpoint of up to ``limit`` holds whose lease has ended; how many. Any process may.

        A hold that cannot be ended keeps no other from it: it is named in the log and tried again each time. A lease
        without a hold is removed.
        """
        expired = 0
        for shard, request_id, tenant in await self._overdue(limit + len(self._damaged)):
            args: dict[str, Argument] = {
                "id": request_id,
                "tenant": tenant,
                "gateway_now": self._clock(),
                "window": self._window_ms,
            }
            try:
                async with guarded():
                    expired += await self._expire.number(keys=_ending_keys(shard, tenant), args=args)
            except ResponseError as error:
                self._note_damaged(request_id, error)
            else:
                self._damaged.discard(request_id)
        return expired

    def _note_damaged(self, request_id: RequestId, error: Exception) -> None:
        if request_id not in self._damaged:
            logger.error("hold %s is over and cannot be ended: %s", request_id, error)
        self._damaged.add(request_id)

    async def _overdue(self, limit: int) -> list[tuple[Shard, RequestId, TenantId]]:
        """Leases that have ended; of no tenant ("") where there is no hold."""
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
        overdue = []
        for (shard, request_id), text in zip(found, holds, strict=True):
            try:
                overdue.append((shard, RequestId(request_id), tenant_in(text) if text else TenantId("")))
            except (ValueError, KeyError, TypeError) as error:
                self._note_damaged(RequestId(request_id), error)
        return overdue

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
        assert grant.price >= 0, "nothing is sold for less than nothing"
        is_new = await self._fill(
            grant.tenant,
            {
                "kind": "grant",
                "source": grant.source,
                "unit": letter_of(grant.unit),
                "amount": grant.amount,
                "expires": grant.expires_at_ms or 0,
                "adapters": ",".join(grant.adapters),
                "price": grant.price or "",
                "reason": "",
                "content": f"{letter_of(grant.unit)}{grant.amount}",
            },
        )
        await self._acknowledge(grant)
        return is_new

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
        is_new = await self._fill(
            adjustment.tenant,
            {
                "kind": "adjust",
                "source": adjustment.source,
                "unit": letter_of(adjustment.unit),
                "amount": adjustment.amount,
                "expires": 0,
                "adapters": "",
                "price": "",
                "reason": adjustment.reason,
                "content": f"a{letter_of(adjustment.unit)}{adjustment.amount}",
            },
        )
        await self._acknowledge(adjustment)
        return is_new

    async def _fill(self, tenant: TenantId, args: Mapping[str, Argument]) -> bool:
        """One new bucket; False where it was filled before."""
        shard, source = shard_for(tenant), str(args["source"])
        async with guarded():
            reply = await self._grant.reply(
                keys={
                    "account": shard.account(tenant),
                    "buckets": shard.buckets(tenant),
                    "stream": shard.stream,
                    "movements": shard.movement(tenant, ""),
                    "movement": shard.movement(tenant, source),
                },
                args={**self._moving(tenant), **args, "most": MAX_BALANCE_NANOS},
            )
        if reply.state == "too_much":
            raise GrantRefused(source, "the account would hold more than can be counted exactly")
        return _is_new(reply, source)

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
        async with guarded():
            reply = await self._claw_back.reply(
                keys={
                    **_moving_keys(tenant),
                    "movement": shard.movement(tenant, clawback.source),
                },
                args={
                    **self._moving(tenant),
                    "source": clawback.source,
                    "granted_by": clawback.granted_by,
                    "allowance_value": pack_bucket(clawback.allowance) if clawback.allowance else "",
                    "former_allowance": clawback.former_allowance_id or "",
                    "amount": clawback.amount,
                    "content": f"c{clawback.amount}:{clawback.granted_by}",
                },
            )
        if reply.state == "not_a_bucket":
            raise GrantRefused(clawback.source, f"{clawback.granted_by} filled no bucket")
        _is_new(reply, clawback.source)
        await self._acknowledge(clawback)
        return reply.number("taken")

    async def restore(self, clawback: Clawback) -> int:
        """Give back what an earlier clawback took, once; what it still waits to take it will not.

        Returns:
            Units given back by the first call.

        Raises:
            GrantRefused: there was no such clawback.
            SourceReused: the restoration's source stands for another movement.
        """
        shard, tenant, source = shard_for(clawback.tenant), clawback.tenant, f"restore:{clawback.source}"
        async with guarded():
            reply = await self._restore.reply(
                keys={
                    **_moving_keys(tenant),
                    "movement": shard.movement(tenant, source),
                    "clawback": shard.movement(tenant, clawback.source),
                },
                args={
                    **self._moving(tenant),
                    "source": source,
                    "undone": clawback.source,
                    "granted_by": clawback.granted_by,
                    "content": f"u{clawback.source}",
                },
            )
        if reply.state == "unknown":
            raise GrantRefused(source, f"{clawback.source} took nothing back")
        _is_new(reply, source)
        await self._acknowledge(Restoration(clawback))
        return reply.number("given")

    async def repay_overage(self, source: str, tenant: TenantId, nanos: int) -> bool:
        """Lower settled exposure when the payment that bills it succeeded, once per source.

        Returns:
            False where this source was counted before.
        """
        assert nanos >= 0, "a payment is not negative"
        shard = shard_for(tenant)
        async with guarded():
            reply = await self._repay.reply(
                keys={
                    "account": shard.account(tenant),
                    "buckets": shard.buckets(tenant),
                    "stream": shard.stream,
                    "movement": shard.movement(tenant, source),
                },
                args={**self._moving(tenant), "source": source, "amount": nanos, "content": f"o{nanos}"},
            )
        is_new = _is_new(reply, source)
        await self._acknowledge(Repayment(source, tenant, nanos))
        return is_new

    def _moving(self, tenant: TenantId) -> dict[str, Argument]:
        """What every movement of credit says besides what it moves."""
        return {"tenant": tenant, "gateway_now": self._clock(), "ttl": MOVEMENT_TTL_MS}

    async def has_moved(self, tenant: TenantId, source: str) -> bool:
        """Was a movement with this idempotency key made on this tenant's account within 400 days?"""
        async with guarded():
            return bool(await self._redis.exists(shard_for(tenant).movement(tenant, source)))

    async def spent(self, tenant: TenantId, month_start_ms: int) -> Nanos:
        """What the tenant's requests held in that month were charged so far."""
        async with guarded():
            month, spent = await self._redis.hmget(shard_for(tenant).account(tenant), ["month", "spent"])
        return Nanos(int(spent or 0)) if month == str(month_start_ms) else Nanos(0)

    async def account(self, tenant: TenantId, funding: Funding | None = None) -> Account:
        """The account as of now, with the allowance in force and no credit; ``funding``: as a hold would find it."""
        shard = shard_for(tenant)
        async with guarded():
            reply = await self._account.reply(
                keys={
                    "account": shard.account(tenant),
                    "buckets": shard.buckets(tenant),
                    "retired": shard.retired(tenant),
                },
                args={
                    "gateway_now": self._clock(),
                    "is_funded": funding is not None,
                    **pack_funding(funding or Funding()),
                },
            )
        return unpack_account(tenant, reply)


def _ending_keys(shard: Shard, tenant: TenantId) -> Mapping[str, str | Sequence[str]]:
    """Every key that ending a hold may touch."""
    return {
        "account": shard.account(tenant),
        "buckets": shard.buckets(tenant),
        "holds": shard.holds,
        "leases": shard.leases,
        "limits": shard.limits(tenant),
        "stream": shard.stream,
        "movements": shard.movement(tenant, ""),
        "settled": shard.settled,
    }


def _moving_keys(tenant: TenantId) -> Mapping[str, str]:
    """What taking credit back and giving it back touch besides their markers."""
    shard = shard_for(tenant)
    return {
        "account": shard.account(tenant),
        "buckets": shard.buckets(tenant),
        "retired": shard.retired(tenant),
        "stream": shard.stream,
        "movements": shard.movement(tenant, ""),
    }


def _is_new(reply: Reply, source: str) -> bool:
    """Whether a movement was made now, and not before. Raises SourceReused."""
    if reply.state == "reused":
        raise SourceReused(source)
    return reply.state != "repeat"
