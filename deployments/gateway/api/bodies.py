"""The response models of tenants' routes. Money is a decimal string of dollars.

The shapes of completions are typed dictionaries: they are written on the path of every request, and need no validation.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Any, Generic, Literal, Self, TypeVar, cast

from pydantic import BaseModel, ConfigDict, Field, with_config
from typing_extensions import TypedDict

from billing.catalog.catalog import Model
from billing.catalog.plans import Limits, Plan
from billing.ledger.account import Account, Bucket, Funding
from billing.ledger.admission import Quote
from billing.money import format_usd
from billing.pricing.prices import Price
from billing.reports.history import Total
from billing.tenants.tenant import ApiKey, Scope, Subscription, Tenant, Throttle
from billing.usage import Draw, Status, Unit, Usage, UsageRecord

T = TypeVar("T")
Dollars = Annotated[str, Field(pattern=r"^-?[0-9]+\.[0-9]{6,9}$", examples=["0.0000245"])]
CLOSED = ConfigDict(extra="forbid")
UnitName = Literal["usd", "requests"]


def unit_name(unit: Unit) -> UnitName:
    return "usd" if unit is Unit.NANOS else "requests"


def amount_of(unit: Unit, amount: int) -> str | int:
    """Dollars as a string, or a number of requests."""
    return format_usd(amount) if unit is Unit.NANOS else amount


class Body(BaseModel):
    """A response whose fields are all documented, and always sent."""

    model_config = ConfigDict(extra="forbid", json_schema_serialization_defaults_required=True)


class Listing(Body, Generic[T]):
    object: Literal["list"] = "list"
    data: list[T]


# Completions.


@with_config(CLOSED)
class PromptDetails(TypedDict):
    cached_tokens: int


@with_config(CLOSED)
class TokenUsage(TypedDict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


def token_usage(usage: Usage) -> TokenUsage:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


@with_config(CLOSED)
class DrawBody(TypedDict):
    """What was drawn from one bucket of credit, in dollars or in requests."""

    bucket: str
    unit: UnitName
    amount: Dollars | int


def draw_body(draw: Draw) -> DrawBody:
    return {"bucket": draw.bucket, "unit": unit_name(draw.unit), "amount": amount_of(draw.unit, draw.amount)}


@with_config(CLOSED)
class ModifierBody(TypedDict):
    """One reason why the price was not the listed one; ``multiplier`` is a decimal string."""

    kind: Literal["volume", "time", "load", "experiment"]
    name: str
    multiplier: str


@with_config(CLOSED)
class ReceiptBody(TypedDict):
    record_id: str
    cost_usd: Dollars
    list_usd: Dollars
    balance_usd: Dollars
    price_version: str
    modifiers: list[ModifierBody]
    adapter: str
    draws: list[DrawBody]


def receipt(record: UsageRecord) -> ReceiptBody:
    return {
        "record_id": record.record_id,
        "cost_usd": format_usd(record.charged_nanos),
        "list_usd": format_usd(record.list_nanos),
        "balance_usd": format_usd(record.balance_nanos),
        "price_version": record.price_version,
        "modifiers": modifiers(record),
        "adapter": record.adapter,
        "draws": [draw_body(draw) for draw in record.draws],
    }


def modifiers(priced: UsageRecord | Quote) -> list[ModifierBody]:
    return [cast(ModifierBody, asdict(modifier)) for modifier in priced.modifiers]


@with_config(CLOSED)
class TokenLogprob(TypedDict):
    token: str
    logprob: float
    bytes: list[int]


@with_config(CLOSED)
class ChatLogprob(TypedDict):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TokenLogprob]


@with_config(CLOSED)
class ChatLogprobs(TypedDict):
    content: list[ChatLogprob]
    refusal: None


@with_config(CLOSED)
class TextLogprobs(TypedDict):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


@with_config(CLOSED)
class ChatMessage(TypedDict):
    role: Literal["assistant"]
    content: str


FinishReasonName = Literal["stop", "length"]


@with_config(CLOSED)
class ChatChoice(TypedDict):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReasonName


@with_config(CLOSED)
class TextChoice(TypedDict):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReasonName


@with_config(CLOSED)
class IncompleteDetails(TypedDict):
    """Why an answer is shorter than asked for, where credit is the reason."""

    reason: str
    message: str


@with_config(CLOSED)
class Incomplete(TypedDict, total=False):
    incomplete_details: IncompleteDetails


@with_config(CLOSED)
class ClosingBody(Incomplete):
    """What ends an answer: its usage and receipt."""

    usage: TokenUsage
    receipt: ReceiptBody


def closing(record: UsageRecord, incomplete: Incomplete) -> ClosingBody:
    return {"usage": token_usage(record.usage), "receipt": receipt(record), **incomplete}


@with_config(CLOSED)
class ChatCompletion(ClosingBody):
    id: str
    created: int
    model: str
    object: Literal["chat.completion"]
    choices: list[ChatChoice]


@with_config(CLOSED)
class TextCompletion(ClosingBody):
    id: str
    created: int
    model: str
    object: Literal["text_completion"]
    choices: list[TextChoice]


# Errors.


class ErrorBody(Body):
    """OpenAI's error object."""

    message: str
    type: str
    param: str | None
    code: str


class Problem(BaseModel):
    """Every error: problem+json (RFC 9457) at the top level, with OpenAI's ``error`` object."""

    type: Annotated[str, Field(pattern="^urn:farebox:problem:", examples=["urn:farebox:problem:insufficient-credits"])]
    title: str
    status: int
    detail: str
    error: ErrorBody
    balance: Dollars | None = None
    held: Dollars | None = None
    required: Dollars | None = None
    currency: Literal["USD"] | None = None
    max_affordable_tokens: int | None = None
    limit: int | None = None
    limit_source: str | None = None
    cap: Dollars | None = None
    spent: Dollars | None = None
    resets_at: str | None = None
    top_up_url: str | None = None
    record_id: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Without the fields that this kind of error does not have."""
        return self.model_dump(exclude_unset=True)


# Quotes and models.


class QuoteBody(Body):
    object: Literal["quote"] = "quote"
    model: str
    adapter: str
    price_version: str
    modifiers: list[ModifierBody]
    prompt_tokens: int
    max_tokens: int
    max_cost_usd: Dollars
    affordable_tokens: int
    covered_by_requests: bool
    admitted: bool
    refusal: ErrorBody | None


class ModelBody(Body):
    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "farebox"
    root: str
    parent: str | None
    adapter: str
    price: Price
    price_version: str

    @classmethod
    def of(cls, model: Model, base_model: str) -> Self:
        return cls(
            id=model.id,
            root=base_model,
            parent=base_model if model.is_adapter else None,
            adapter=model.identity,
            price=model.price,
            price_version=model.price.version,
        )


# Accounts.


class _BucketBody(Body):
    id: str
    expires_at_ms: int | None
    adapters: list[str]


class MoneyBucket(_BucketBody):
    unit: Literal["usd"] = "usd"
    remaining_usd: Dollars
    granted_usd: Dollars


class RequestsBucket(_BucketBody):
    unit: Literal["requests"] = "requests"
    remaining: int
    granted: int


def bucket_body(bucket: Bucket) -> MoneyBucket | RequestsBucket:
    shared: Mapping[str, Any] = {
        "id": bucket.id,
        "expires_at_ms": bucket.expires_at_ms,
        "adapters": list(bucket.adapters),
    }
    if bucket.unit is Unit.REQUESTS:
        return RequestsBucket(remaining=bucket.remaining, granted=bucket.granted, **shared)
    return MoneyBucket(remaining_usd=format_usd(bucket.remaining), granted_usd=format_usd(bucket.granted), **shared)


class MoneyAllowance(MoneyBucket):
    """``usable_usd`` is what can be drawn of it: while ``debt_usd`` is owed elsewhere, so much of it stays."""

    usable_usd: Dollars
    debt_usd: Dollars


class RequestsAllowance(RequestsBucket):
    """``usable`` is what can be drawn of it: while ``debt`` is owed elsewhere, so much of it stays."""

    usable: int
    debt: int


def allowance_body(account: Account) -> MoneyAllowance | RequestsAllowance | None:
    """The allowance that counts, with what of it can be used."""
    bucket = account.allowance
    if bucket is None:
        return None
    fields = bucket_body(bucket).model_dump()
    usable, debt = account.usable(bucket), account.debt_beside(bucket)
    if bucket.unit is Unit.REQUESTS:
        return RequestsAllowance(**fields, usable=usable, debt=debt)
    return MoneyAllowance(**fields, usable_usd=format_usd(usable), debt_usd=format_usd(debt))


class SubscriptionBody(Subscription):
    scheduled_plan: str | None
    """The plan that it changes to when its period ends; null where no change is scheduled."""


class AccountBody(Body):
    """A tenant's account, as a hold would find it now."""

    object: Literal["account"] = "account"
    tenant: str
    plan: str
    plan_kind: str
    suspended: bool
    balance_usd: Dollars
    held_usd: Dollars
    held_requests: int
    overage_usd: Dollars
    overage_cap_usd: Dollars
    allowance: MoneyAllowance | RequestsAllowance | None
    packs: list[MoneyBucket | RequestsBucket]
    open_holds: int
    limits: Limits
    subscription: SubscriptionBody | None

    @classmethod
    def of(
        cls,
        tenant: Tenant,
        plan: Plan,
        funding: Funding,
        account: Account,
        scheduled_plan: str | None = None,
        **more: Any,
    ) -> Self:
        one = tenant.subscription
        return cls(
            tenant=tenant.id,
            plan=tenant.plan,
            plan_kind=plan.kind.value,
            suspended=tenant.suspended,
            balance_usd=format_usd(account.balance_nanos),
            held_usd=format_usd(account.held_nanos),
            held_requests=account.held_requests,
            overage_usd=format_usd(account.overage_nanos),
            overage_cap_usd=format_usd(funding.credit_limit),
            allowance=allowance_body(account),
            packs=[bucket_body(bucket) for bucket in account.buckets if not bucket.is_allowance],
            open_holds=account.open_holds,
            limits=plan.limits,
            subscription=None if one is None else SubscriptionBody(**dict(one), scheduled_plan=scheduled_plan),
            **more,
        )


class OwnAccountBody(AccountBody):
    """The account of the key that asks."""

    throttled: Throttle | None
    """Why the key that asks may do little for now."""
    quarantine: Throttle | None
    """The same as ``throttled``, under its name before 0.2."""


class UsageTotal(Body):
    """The total of one model or of one day."""

    model_config = ConfigDict(json_schema_serialization_defaults_required=False)

    model: str | None = None
    day: str | None = None
    records: int
    requests: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    compute_ms: int
    list_usd: Dollars
    charged_usd: Dollars
    overage_usd: Dollars

    @classmethod
    def of(cls, total: Total, group_by: Literal["model", "day"]) -> Self:
        group: Mapping[str, Any] = {group_by: total.group}
        return cls(
            **group,
            records=total.records,
            requests=total.requests,
            prompt_tokens=total.prompt_tokens,
            cached_tokens=total.cached_tokens,
            completion_tokens=total.completion_tokens,
            compute_ms=total.compute_ms,
            list_usd=format_usd(total.list_nanos),
            charged_usd=format_usd(total.charged_nanos),
            overage_usd=format_usd(total.overage_nanos),
        )


class UsageBody(Body):
    object: Literal["usage"]
    start: str
    end: str
    group_by: Literal["model", "day"]
    data: list[UsageTotal]


class RecordBody(Body):
    record_id: str
    request_id: str
    seq: int
    key_id: str
    adapter: str
    plan: str
    price_version: str
    modifiers: list[ModifierBody]
    status: Status
    occurred_at_ms: int
    usage: Usage
    list_usd: Dollars
    charged_usd: Dollars
    overage_usd: Dollars
    balance_usd: Dollars
    draws: list[DrawBody]

    @classmethod
    def of(cls, record: UsageRecord) -> Self:
        return cls(
            record_id=record.record_id,
            request_id=record.request_id,
            seq=record.seq,
            key_id=record.key_id,
            adapter=record.adapter,
            plan=record.plan,
            price_version=record.price_version,
            modifiers=modifiers(record),
            status=record.status,
            occurred_at_ms=record.occurred_at_ms,
            usage=record.usage,
            list_usd=format_usd(record.list_nanos),
            charged_usd=format_usd(record.charged_nanos),
            overage_usd=format_usd(record.overage_nanos),
            balance_usd=format_usd(record.balance_nanos),
            draws=[draw_body(draw) for draw in record.draws],
        )


class RecordPage(Listing[RecordBody]):
    next_cursor: str | None


# API keys.


class KeyBody(Body):
    object: Literal["api_key"] = "api_key"
    id: str
    tenant: str
    shown: str
    name: str
    models: list[str] | None
    limits: Limits
    daily_cap: Dollars | None
    monthly_cap: Dollars | None
    manages_keys: bool
    """Whether ``scopes`` has ``keys:write``, under its name before 0.2."""
    scopes: list[Scope]
    made_by: str
    """The id of the key that made or rotated it, ``admin`` or ``dodo``; empty where it is older than this field."""
    throttled: Throttle | None
    quarantine: Throttle | None
    """The same as ``throttled``, under its name before 0.2."""
    lifted_at_ms: int
    counts_as: str
    created_at_ms: int
    expires_at_ms: int | None
    revoked_at_ms: int | None

    @classmethod
    def of(cls, key: ApiKey) -> Self:
        return cls(**key.model_dump(exclude={"hash"}, mode="json"), quarantine=key.throttled)


class NewKeyBody(Body):
    """The only reply that has the secret."""

    api_key: str
    key: KeyBody


# Webhooks and health.


class Received(Body):
    received: Literal[True] = True


class Alive(Body):
    status: Literal["ok"] = "ok"


class Checks(Body):
    store: bool
    catalogue: bool
    replica: bool


class Ready(Body):
    status: Literal["ready", "not ready"]
    checks: Checks
