"""How values of ``billing.ledger.account`` stand in the store and in the arguments of its scripts.

Knows the text of a bucket, a hold and a usage; the same formats stand in ``lua/common.lua``.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from typing import Any

from billing.errors import BillingError
from billing.ledger.account import Account, Bucket, Hold, HoldRequest, HoldSnapshot, LimitsLeft, Settlement
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
    )
    return "|".join(str(part) for part in parts)


def unpack_bucket(bucket_id: str, text: str) -> tuple[Bucket, int]:
    """A bucket and what open holds drew from it."""
    unit, remaining, held, granted, expires, is_allowance, adapters = text.split("|", 6)
    bucket = Bucket(
        id=BucketId(bucket_id),
        unit=_UNIT[unit],
        remaining=int(remaining),
        granted=int(granted),
        expires_at_ms=int(expires) or None,
        adapters=tuple(adapters.split(",")) if adapters else (),
        is_allowance=is_allowance == "1",
    )
    return bucket, int(held)


def unpack_account(tenant: TenantId, numbers: Sequence[str | None], texts: Mapping[str, str], now_ms: int) -> Account:
    """What ``account.lua`` answers; buckets that expired with nothing owed are left out."""
    seq, open_holds, overage, overage_held = (int(number or 0) for number in numbers)
    buckets = [unpack_bucket(name, text) for name, text in texts.items()]
    live = [b for b, _ in buckets if b.expires_at_ms is None or b.expires_at_ms > now_ms or b.remaining < 0]
    return Account(
        tenant=tenant,
        buckets=tuple(sorted(live, key=lambda b: (not b.is_allowance, b.expires_at_ms or 2**63, b.id))),
        held_nanos=Nanos(overage_held + sum(held for b, held in buckets if b.unit is Unit.NANOS)),
        held_requests=sum(held for b, held in buckets if b.unit is Unit.REQUESTS),
        overage_nanos=Nanos(overage),
        seq=seq,
        open_holds=open_holds,
    )


def unpack_allowance(given: Bucket, text: str) -> Bucket:
    """What is left of an allowance, where it was put in place before; it ends when the one that is given now does."""
    kept = unpack_bucket(given.id, text)[0] if text else given
    return replace(kept, expires_at_ms=max(kept.expires_at_ms or 0, given.expires_at_ms or 0) or None)


def pack_usage(usage: Usage) -> str:
    tokens = (usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens)
    return ",".join(str(count) for count in (*tokens, usage.requests, usage.compute_ms))


LEAST_COMPUTE_MS = 1_000
"""Where a price counts compute, no hold begins with less of it."""


def worst_case(request: HoldRequest) -> Nanos:
    """The most that a request may cost."""
    return _at_most(request, request.max_tokens, request.max_compute_ms)


def first_step(request: HoldRequest) -> Nanos:
    """The prompt and the first step of output: what a hold begins with."""
    return _at_most(request, min(request.step_tokens, request.max_tokens), request.step_compute_ms)


def least(request: HoldRequest) -> Nanos:
    """The cost of the shortest answer: one token."""
    return _at_most(request, min(1, request.max_tokens), LEAST_COMPUTE_MS)


def _at_most(request: HoldRequest, tokens: int, compute_ms: int) -> Nanos:
    if request.price.free:
        return Nanos(0)
    cost = request.price.at_most(request.prompt_tokens, tokens, min(compute_ms, request.max_compute_ms))
    return min(cost, MAX_BALANCE_NANOS)


def pack_caps(caps: Iterable[SpendCap]) -> str:
    return ",".join(f"{cap.window}|{cap.start_ms}|{cap.nanos}" for cap in caps)


def pack_hold(request: HoldRequest, calendar_ms: int, window_ms: int, is_preview: bool) -> list[str]:
    """The arguments of ``hold.lua``, in its order."""
    allowance, limits = request.funding.allowance, request.limits
    return [
        str(argument)
        for argument in (
            request.request_id,
            request.tenant,
            _head(request),
            f"{request.prompt_tokens}|{request.max_tokens}",
            request.counted_key,
            worst_case(request),
            first_step(request),
            least(request),
            int(request.price.free),
            request.model,
            request.lease_ms,
            calendar_ms,
            window_ms,
            allowance.id if allowance else "",
            pack_bucket(allowance) if allowance else "",
            request.funding.credit_limit,
            limits.requests_per_minute or 0,
            limits.tokens_per_minute or 0,
            limits.concurrent_requests or 0,
            request.prompt_tokens + request.max_tokens,
            int(is_preview),
            request.month_start_ms,
            limits.requests_at_once,
            pack_caps(request.caps),
        )
    ]


def snapshot_of(hold: Hold, held_nanos: Nanos) -> HoldSnapshot:
    """What a settle needs to know of its hold, should the store lose it. ``held_nanos``: with all extensions."""
    first = hold.draws[0] if hold.draws else None
    is_covered = hold.covered_by_requests
    return HoldSnapshot(
        head=_head(hold.request),
        unit=Unit.REQUESTS if is_covered else Unit.NANOS,
        bucket=first.bucket if first else BucketId(""),
        held=1 if is_covered else held_nanos,
        credit_limit=hold.request.funding.credit_limit,
        held_at_ms=hold.lease_ends_at_ms - hold.request.lease_ms,
        counted_key=hold.request.counted_key,
        caps=hold.request.caps,
        month_start_ms=hold.request.month_start_ms,
    )


def pack_settlement(settlement: Settlement) -> str:
    return json.dumps(asdict(settlement), separators=(",", ":"))


def unpack_settlement(text: str) -> Settlement:
    """Raises ValueError, KeyError, TypeError or AssertionError for what ``pack_settlement`` did not write."""
    raw = json.loads(text)
    return Settlement(
        request_id=RequestId(raw["request_id"]),
        tenant=TenantId(raw["tenant"]),
        usage=Usage(**raw["usage"]),
        list_nanos=Nanos(int(raw["list_nanos"])),
        status=Status(raw["status"]),
        origin=_unpack_snapshot(raw["origin"]) if raw.get("origin") else None,
        is_undelivered=bool(raw.get("is_undelivered", raw.get("is_withdrawn", False))),
    )


def _unpack_snapshot(raw: Mapping[str, Any]) -> HoldSnapshot:
    return HoldSnapshot(
        head=raw["head"],
        unit=Unit(raw["unit"]),
        bucket=BucketId(raw["bucket"]),
        held=int(raw["held"]),
        credit_limit=Nanos(int(raw["credit_limit"] if "credit_limit" in raw else raw["overage_cap"])),
        held_at_ms=int(raw["held_at_ms"]),
        counted_key=str(raw.get("counted_key", "")),
        caps=tuple(
            SpendCap(Window(cap["window"]), int(cap["start_ms"]), Nanos(cap["nanos"])) for cap in raw.get("caps", ())
        ),
        month_start_ms=int(raw.get("month_start_ms", 0)),
    )


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


def unpack_draws(rows: Iterable[Sequence[str]]) -> tuple[Draw, ...]:
    """What an open hold drew, as it stands in the hold."""
    return tuple(Draw(BucketId(bucket), _UNIT[unit], int(amount)) for bucket, unit, amount in rows)


def unpack_hold(request: HoldRequest, reply: Sequence[str], calendar_ms: int) -> Hold:
    """What ``hold.lua`` answered.

    Raises:
        DuplicateRequest, RateLimited, InsufficientCredits, CreditOnHold, SpendCapReached, ClockAstray: as it decided.
    """
    if reply[0] != "held":
        raise _refusal(request, reply, calendar_ms)
    balance, lease_end, affords, *limits, clamped_by = reply[1:9]
    words = iter(reply[9:])
    draws = tuple(Draw(BucketId(i), _UNIT[u], int(n)) for i, u, n in zip(words, words, words, strict=True))
    covered = any(draw.unit is Unit.REQUESTS for draw in draws)
    return Hold(
        request=request,
        max_tokens=request.max_tokens if covered else _tokens_paid(request, int(affords)),
        draws=draws,
        lease_ends_at_ms=int(lease_end),
        balance_nanos=Nanos(int(balance)),
        covered_by_requests=covered,
        limits_left=_limits_left(limits),
        clamped_by=_capped(clamped_by.split("|"), calendar_ms) if clamped_by else None,
    )


def _tokens_paid(request: HoldRequest, nanos: int) -> int:
    if nanos == worst_case(request):
        return request.max_tokens
    compute_ms = min(LEAST_COMPUTE_MS, request.max_compute_ms)
    return request.price.affordable_tokens(request.prompt_tokens, nanos, request.max_tokens, compute_ms)


def _limits_left(words: Sequence[str]) -> LimitsLeft:
    requests, requests_reset, tokens, tokens_reset = words
    return LimitsLeft(
        requests=int(requests) if requests else None,
        requests_reset_s=int(requests_reset or 0) / 1000,
        tokens=int(tokens) if tokens else None,
        tokens_reset_s=int(tokens_reset or 0) / 1000,
    )


def _refusal(request: HoldRequest, reply: Sequence[str], calendar_ms: int) -> BillingError:
    if reply[0] == "duplicate":
        return DuplicateRequest(request.request_id)
    if reply[0] == "astray":
        return ClockSkewError(int(reply[1]))
    if reply[0] == "limited":
        kind, limit, wait_ms, reset_ms = reply[1], *(int(word) for word in reply[2:5])
        at_once = request.limits.requests_at_once if kind == "requests" else limit
        return RateLimited(kind, limit, retry_after_s=wait_ms / 1000, reset_s=reset_ms / 1000, at_once=at_once)
    return _short_of_credit(request, reply, least(request), calendar_ms)


def _capped(words: Sequence[str], calendar_ms: int) -> SpendCapReached:
    """From a cap as a script tells it: window, start, nanos, spent."""
    window, start_ms = Window(words[0]), int(words[1])
    ends_ms = end_ms(window, start_ms)
    return SpendCapReached(
        window=window.value,
        cap_nanos=Nanos(int(words[2])),
        spent_nanos=Nanos(int(words[3])),
        resets_at=datetime.fromtimestamp(ends_ms // 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        retry_after_s=max(1, ends_ms - calendar_ms) / 1000,
    )


def _cap_on_hold(words: Sequence[str], needed: Nanos) -> CreditOnHold:
    """The key's other requests hold what its cap has left."""
    cap, spent, held = (int(word) for word in words[2:5])
    return CreditOnHold(RETRY_HELD_S, Nanos(cap - spent - held), Nanos(held), needed)


def _short_of_credit(request: HoldRequest, reply: Sequence[str], needed: Nanos, calendar_ms: int) -> BillingError:
    if reply[0] == "capped":
        return _capped(reply[1:], calendar_ms)
    if reply[0] == "cap_on_hold":
        return _cap_on_hold(reply[1:], needed)
    balance, available, held = (int(word) for word in reply[1:4])
    if reply[0] == "on_hold":
        return CreditOnHold(
            retry_after_s=RETRY_HELD_S,
            balance_nanos=Nanos(balance),
            held_nanos=Nanos(held),
            required_nanos=needed,
        )
    assert reply[0] == "insufficient", f"a script answers {reply[0]!r}"
    return InsufficientCredits(
        balance_nanos=Nanos(balance),
        required_nanos=worst_case(request),
        max_affordable_tokens=max(0, _tokens_paid(request, available)),
        limit_source="overage_cap" if request.funding.credit_limit else "balance",
    )


def unpack_extension(request: HoldRequest, reply: Sequence[str], least_nanos: Nanos, calendar_ms: int) -> Nanos:
    """What ``extend.lua`` answered: the nanos that the hold now has.

    Raises:
        UnknownHold, InsufficientCredits, CreditOnHold, SpendCapReached: as it decided.
    """
    if reply[0] == "held":
        return Nanos(int(reply[1]))
    if reply[0] == "unknown":
        raise UnknownHold(request.request_id)
    raise _short_of_credit(request, reply, least_nanos, calendar_ms)


def tenant_in(hold: str) -> TenantId:
    """Whose an open hold is, as it stands in the store."""
    return TenantId(json.loads(hold)["tenant"])


def pairs(flat: Sequence[str]) -> Mapping[str, str]:
    """A hash as a script returns it: names and values in turn."""
    words = iter(flat)
    return dict(zip(words, words, strict=True))
