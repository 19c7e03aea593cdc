"""How values of ``billing.ledger.account`` are written in the store and in the arguments and replies of its scripts.

The text of a bucket is that of ``lua/lib/buckets.lua``, the text of a usage that of ``lua/lib/bill.lua``.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from billing.clock import iso
from billing.errors import BillingError
from billing.ledger.account import Account, Bucket, Funding, Hold, HoldRequest, HoldSnapshot, LimitsLeft, Settlement
from billing.ledger.errors import (
    CreditOnHold,
    DuplicateRequest,
    InsufficientCredits,
    RateLimited,
    SpendCapReached,
    UnknownHold,
)
from billing.money import MAX_BALANCE_NANOS, Nanos
from billing.store.errors import ClockSkewError
from billing.store.scripts import Argument, Reply
from billing.tenants.spend_caps import SpendCap, Window, end_ms
from billing.usage import BucketId, Draw, RequestId, Status, TenantId, Unit, Usage

RETRY_HELD_S = 2
"""When to ask again for credit that running requests hold: about the time between two checkpoints."""

_LETTER = {Unit.NANOS: "n", Unit.REQUESTS: "r"}
_UNIT = {letter: unit for unit, letter in _LETTER.items()}


def letter_of(unit: Unit) -> str:
    return _LETTER[unit]


def pack_bucket(bucket: Bucket) -> str:
    """A bucket that nothing was drawn from yet."""
    parts = (
        _LETTER[bucket.unit],
        bucket.remaining,
        0,
        bucket.granted,
        bucket.expires_at_ms or 0,
        int(bucket.is_allowance),
        ",".join(bucket.adapters),
        *((bucket.price, bucket.sold or bucket.granted) if bucket.price else ()),
    )
    return "|".join(str(part) for part in parts)


def unpack_bucket(bucket_id: str, text: str) -> tuple[Bucket, int]:
    """A bucket and what open holds drew from it."""
    unit, remaining, held, granted, expires, is_allowance, adapters, *sale = text.split("|")
    price, sold = sale or (0, 0)
    bucket = Bucket(
        id=BucketId(bucket_id),
        unit=_UNIT[unit],
        remaining=int(remaining),
        granted=int(granted),
        expires_at_ms=int(expires) or None,
        adapters=tuple(adapters.split(",")) if adapters else (),
        is_allowance=is_allowance == "1",
        price=int(price),
        sold=int(sold),
    )
    return bucket, int(held)


def pack_funding(funding: Funding) -> dict[str, Argument]:
    """The arguments of a script that draws as a plan allows."""
    allowance = funding.allowance
    return {
        "allowance": allowance.id if allowance else "",
        "allowance_value": pack_bucket(allowance) if allowance else "",
        "former_allowance": funding.former_allowance_id or "",
        "credit_limit": funding.credit_limit,
    }


def unpack_account(tenant: TenantId, reply: Reply) -> Account:
    """What ``account.lua`` answered."""
    return Account(
        tenant=tenant,
        buckets=tuple(unpack_bucket(name, text)[0] for name, text in reply.rows),
        balance_nanos=Nanos(reply.number("balance")),
        available_nanos=Nanos(reply.number("available")),
        held_nanos=Nanos(reply.number("held")),
        held_requests=reply.number("held_requests"),
        overage_nanos=Nanos(reply.number("exposure")),
        seq=reply.number("seq"),
        open_holds=reply.number("open"),
        allowance_id=BucketId(reply["allowance"]) if reply["allowance"] else None,
    )


def pack_usage(usage: Usage) -> str:
    tokens = (usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens)
    return ",".join(str(count) for count in (*tokens, usage.requests, usage.compute_ms))


LEAST_COMPUTE_MS = 1_000
"""Where a price counts compute, no hold begins with less of it."""


def max_cost(request: HoldRequest) -> Nanos:
    """The most that a request may cost."""
    return _at_most(request, request.max_tokens, request.max_compute_ms)


def _initial_hold(request: HoldRequest) -> Nanos:
    """The prompt and the first step of output."""
    return _at_most(request, min(request.step_tokens, request.max_tokens), request.step_compute_ms)


def _min_cost(request: HoldRequest) -> Nanos:
    """The cost of the shortest answer: one token."""
    return _at_most(request, min(1, request.max_tokens), LEAST_COMPUTE_MS)


def _at_most(request: HoldRequest, tokens: int, compute_ms: int) -> Nanos:
    if request.price.free:
        return Nanos(0)
    cost = request.price.at_most(request.prompt_tokens, tokens, min(compute_ms, request.max_compute_ms))
    return min(cost, MAX_BALANCE_NANOS)


def pack_caps(caps: Iterable[SpendCap]) -> list[tuple[str, int, int]]:
    return [(cap.window.value, cap.start_ms, cap.nanos) for cap in caps]


def pack_hold(request: HoldRequest) -> dict[str, Argument]:
    """The arguments of ``hold.lua`` that a request decides."""
    limits = request.limits
    return {
        "id": request.request_id,
        "tenant": request.tenant,
        "head": _head(request),
        "sizes": f"{request.prompt_tokens}|{request.max_tokens}",
        "key": request.counted_key,
        "model": request.model,
        "max_cost": max_cost(request),
        "initial_hold": _initial_hold(request),
        "min_cost": _min_cost(request),
        "is_free": request.price.free,
        "lease": request.lease_ms,
        "rpm": limits.requests_per_minute or 0,
        "tpm": limits.tokens_per_minute or 0,
        "concurrency": limits.concurrent_requests or 0,
        "tokens": request.prompt_tokens + request.max_tokens,
        "burst": limits.requests_at_once,
        "month": request.month_start_ms,
        "caps": pack_caps(request.caps),
        **pack_funding(request.funding),
    }


def snapshot_of(hold: Hold, held_nanos: Nanos) -> HoldSnapshot:
    """What a settle carries of its hold, should the store lose it. ``held_nanos``: with all extensions."""
    is_covered = hold.covered_by_requests
    return HoldSnapshot(
        head=_head(hold.request),
        unit=Unit.REQUESTS if is_covered else Unit.NANOS,
        drawn=tuple(draw.bucket for draw in hold.draws),
        held=1 if is_covered else held_nanos,
        credit_limit=hold.request.funding.credit_limit,
        held_at_ms=hold.lease_ends_at_ms - hold.request.lease_ms,
        counted_key=hold.request.counted_key,
        caps=hold.request.caps,
        month_start_ms=hold.request.month_start_ms,
        allowance=hold.request.funding.allowance,
    )


def pack_settlement(settlement: Settlement) -> str:
    return json.dumps(asdict(settlement), separators=(",", ":"))


def unpack_settlement(text: str) -> Settlement:
    """Reads lines of the version before, too: they have ``origin`` for ``snapshot``.

    Raises ValueError, KeyError, TypeError or AssertionError for what ``pack_settlement`` did not write.
    """
    raw = json.loads(text)
    snapshot = raw.get("snapshot") or raw.get("origin")
    return Settlement(
        request_id=RequestId(raw["request_id"]),
        tenant=TenantId(raw["tenant"]),
        usage=Usage(**raw["usage"]),
        list_nanos=Nanos(int(raw["list_nanos"])),
        status=Status(raw["status"]),
        snapshot=_unpack_snapshot(snapshot) if snapshot else None,
        is_undelivered=bool(raw.get("is_undelivered", raw.get("is_withdrawn", False))),
    )


def _unpack_snapshot(raw: Mapping[str, Any]) -> HoldSnapshot:
    """The version before kept the first bucket alone, and called the credit limit ``overage_cap``."""
    drawn = raw["drawn"] if "drawn" in raw else [raw["bucket"]] if raw["bucket"] else []
    return HoldSnapshot(
        head=raw["head"],
        unit=Unit(raw["unit"]),
        drawn=tuple(BucketId(bucket) for bucket in drawn),
        held=int(raw["held"]),
        credit_limit=Nanos(int(raw["credit_limit"] if "credit_limit" in raw else raw["overage_cap"])),
        held_at_ms=int(raw["held_at_ms"]),
        counted_key=str(raw.get("counted_key", "")),
        caps=tuple(
            SpendCap(Window(cap["window"]), int(cap["start_ms"]), Nanos(cap["nanos"])) for cap in raw.get("caps", ())
        ),
        month_start_ms=int(raw.get("month_start_ms", 0)),
        allowance=_unpack_allowance(raw["allowance"]) if raw.get("allowance") else None,
    )


def _unpack_allowance(raw: Mapping[str, Any]) -> Bucket:
    return Bucket(**{**raw, "unit": Unit(raw["unit"]), "adapters": tuple(raw["adapters"])})


def _head(request: HoldRequest) -> str:
    """The members of the usage record that a hold freezes, as they will stand in its JSON."""
    frozen: dict[str, object] = {
        "request_id": request.request_id,
        "tenant": request.tenant,
        "key_id": request.key_id,
        "adapter": request.adapter,
        "adapter_class": request.adapter_class,
        "plan": request.plan,
        "price_version": request.price.version,
    }
    if request.modifiers:
        frozen["modifiers"] = [asdict(modifier) for modifier in request.modifiers]
    return json.dumps(frozen, separators=(",", ":"))[1:-1]


def unpack_hold(request: HoldRequest, reply: Reply, gateway_now_ms: int) -> Hold:
    """What ``hold.lua`` answered.

    Raises:
        DuplicateRequest, RateLimited, InsufficientCredits, CreditOnHold, SpendCapReached: as it decided.
        ClockSkewError: the two clocks differ by too much.
    """
    if reply.state != "held":
        raise _refusal(request, reply, gateway_now_ms)
    draws = unpack_draws(reply.rows)
    covered = any(draw.unit is Unit.REQUESTS for draw in draws)
    return Hold(
        request=request,
        max_tokens=request.max_tokens if covered else _tokens_paid(request, reply.number("affords")),
        draws=draws,
        lease_ends_at_ms=reply.number("lease_end"),
        balance_nanos=Nanos(reply.number("balance")),
        covered_by_requests=covered,
        limits_left=_limits_left(reply.words),
        clamped_by=_capped([reply[f"cap_{word}"] for word in _CAP_WORDS], gateway_now_ms)
        if reply["cap_window"]
        else None,
    )


def _limits_left(words: Mapping[str, str]) -> LimitsLeft:
    requests, tokens = words["requests"], words["tokens"]
    return LimitsLeft(
        requests=int(requests) if requests else None,
        requests_reset_s=int(words["requests_reset"] or 0) / 1000,
        tokens=int(tokens) if tokens else None,
        tokens_reset_s=int(words["tokens_reset"] or 0) / 1000,
    )


def _tokens_paid(request: HoldRequest, nanos: int) -> int:
    if nanos == max_cost(request):
        return request.max_tokens
    compute_ms = min(LEAST_COMPUTE_MS, request.max_compute_ms)
    return request.price.affordable_tokens(request.prompt_tokens, nanos, request.max_tokens, compute_ms)


def _refusal(request: HoldRequest, reply: Reply, gateway_now_ms: int) -> BillingError:
    if reply.state == "duplicate":
        return DuplicateRequest(request.request_id)
    if reply.state == "skewed":
        return ClockSkewError(reply.number("ahead"))
    if reply.state == "limited":
        kind, limit = reply["kind"], reply.number("limit")
        wait_s, reset_s = reply.number("wait") / 1000, reply.number("reset") / 1000
        at_once = request.limits.requests_at_once if kind == "requests" else limit
        return RateLimited(kind, limit, retry_after_s=wait_s, reset_s=reset_s, at_once=at_once)
    return _short_of_credit(request, reply, _min_cost(request), gateway_now_ms)


_CAP_WORDS = ("window", "start", "nanos", "spent")


def _capped(words: Sequence[str], gateway_now_ms: int) -> SpendCapReached:
    """From a cap in a reply: ``_CAP_WORDS``."""
    window, start_ms = Window(words[0]), int(words[1])
    ends_ms = end_ms(window, start_ms)
    return SpendCapReached(
        window=window.value,
        cap_nanos=Nanos(int(words[2])),
        spent_nanos=Nanos(int(words[3])),
        resets_at=iso(ends_ms),
        retry_after_s=max(1, ends_ms - gateway_now_ms) / 1000,
    )


def _short_of_credit(request: HoldRequest, reply: Reply, needed: Nanos, gateway_now_ms: int) -> BillingError:
    if reply.state == "capped":
        return _capped([reply[word] for word in _CAP_WORDS], gateway_now_ms)
    if reply.state == "cap_on_hold":  # the key's other requests hold what its cap has left
        held = Nanos(reply.number("held"))
        return CreditOnHold(RETRY_HELD_S, Nanos(reply.number("nanos") - reply.number("spent") - held), held, needed)
    balance = Nanos(reply.number("balance"))
    if reply.state == "on_hold":
        return CreditOnHold(RETRY_HELD_S, balance, Nanos(reply.number("held")), needed)
    assert reply.state == "insufficient", f"a script answers {reply.state!r}"
    return InsufficientCredits(
        balance_nanos=balance,
        required_nanos=max_cost(request),
        max_affordable_tokens=max(0, _tokens_paid(request, reply.number("available"))),
        limit_source=_limit_source(request.funding, balance),
    )


def _limit_source(funding: Funding, balance: Nanos) -> str:
    """Credit is extended to no tenant in debt, however much of the limit is left."""
    if balance < 0:
        return "debt"
    return "overage_cap" if funding.credit_limit else "balance"


def unpack_extension(request: HoldRequest, reply: Reply, least_nanos: Nanos, gateway_now_ms: int) -> Nanos:
    """What ``extend.lua`` answered: the nanos that the hold now has.

    Raises:
        UnknownHold, InsufficientCredits, CreditOnHold, SpendCapReached: as it decided.
    """
    if reply.state == "held":
        return Nanos(reply.number("nanos"))
    if reply.state == "unknown":
        raise UnknownHold(request.request_id)
    raise _short_of_credit(request, reply, least_nanos, gateway_now_ms)


def unpack_draws(rows: Iterable[Sequence[str]]) -> tuple[Draw, ...]:
    """Draws as they stand in a hold and in the reply that made it."""
    return tuple(Draw(BucketId(bucket), _UNIT[unit], int(amount)) for bucket, unit, amount in rows)


def tenant_in(hold: str) -> TenantId:
    """Whose an open hold is, as it stands in the store."""
    return TenantId(json.loads(hold)["tenant"])
