"""The shape of every answer, as the OpenAPI document tells it.

Knows names and types; the routers fill them. Money is a decimal string of dollars.
"""

from typing import Annotated, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from billing.catalog.plans import Limits
from billing.pricing.prices import Price
from billing.tenants.tenant import Subscription, Throttle
from billing.usage import Status, Usage

T = TypeVar("T")
Dollars = Annotated[str, Field(pattern=r"^-?[0-9]+\.[0-9]{6,9}$", examples=["0.0000245"])]


class Body(BaseModel):
    """Documented whole: a field that is not here is not sent."""

    model_config = ConfigDict(extra="forbid")


class Listing(Body, Generic[T]):
    object: Literal["list"]
    data: list[T]


class PromptDetails(Body):
    cached_tokens: int


class TokenUsage(Body):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class DrawBody(Body):
    """What was drawn from one bucket of credit, in dollars or in requests."""

    bucket: str
    unit: Literal["usd", "requests"]
    amount: Dollars | int


class ModifierBody(Body):
    """One reason why the price was not the listed one; ``multiplier`` is a decimal string."""

    kind: Literal["volume", "time", "load", "experiment"]
    name: str
    multiplier: str


class ReceiptBody(Body):
    record_id: str
    cost_usd: Dollars
    list_usd: Dollars
    balance_usd: Dollars
    price_version: str
    modifiers: list[ModifierBody]
    adapter: str
    draws: list[DrawBody]


class TokenLogprob(Body):
    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(TokenLogprob):
    top_logprobs: list[TokenLogprob]


class ChatLogprobs(Body):
    content: list[ChatLogprob]
    refusal: None


class TextLogprobs(Body):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class ChatMessage(Body):
    role: Literal["assistant"]
    content: str


class ChatChoice(Body):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]


class TextChoice(Body):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length"]


class IncompleteDetails(Body):
    """Why an answer is shorter than asked for, where credit is the reason."""

    reason: str
    message: str


class _Completed(Body):
    id: str
    created: int
    model: str
    usage: TokenUsage
    receipt: ReceiptBody
    incomplete_details: IncompleteDetails | None = None


class ChatCompletion(_Completed):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class TextCompletion(_Completed):
    object: Literal["text_completion"]
    choices: list[TextChoice]


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


class QuoteBody(Body):
    object: Literal["quote"]
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
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    adapter: str
    price: Price
    price_version: str


class _BucketBody(Body):
    id: str
    expires_at_ms: int | None
    adapters: list[str]


class MoneyBucket(_BucketBody):
    unit: Literal["usd"]
    remaining_usd: Dollars
    granted_usd: Dollars


class RequestsBucket(_BucketBody):
    unit: Literal["requests"]
    remaining: int
    granted: int


class AccountBody(Body):
    object: Literal["account"]
    tenant: str
    plan: str
    plan_kind: str
    suspended: bool
    balance_usd: Dollars
    held_usd: Dollars
    held_requests: int
    overage_usd: Dollars
    overage_cap_usd: Dollars
    allowance: MoneyBucket | RequestsBucket | None
    packs: list[MoneyBucket | RequestsBucket]
    open_holds: int
    limits: Limits
    subscription: Subscription | None
    throttled: Throttle | None = None
    quarantine: Throttle | None = None
    """The same, under its name before 0.2."""
    """Why the key that asks may do little for now."""


class UsageTotal(Body):
    """One model's or one day's total."""

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


class RecordPage(Listing[RecordBody]):
    next_cursor: str | None


class Received(Body):
    received: Literal[True]


class Alive(Body):
    status: Literal["ok"]


class Checks(Body):
    store: bool
    catalog: bool
    replica: bool


class Ready(Body):
    status: Literal["ready", "not ready"]
    checks: Checks
