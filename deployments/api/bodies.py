"""The shape of every answer, as the OpenAPI document tells it.

Knows names and types; the routers fill them. Money is a decimal string of dollars.
"""

from typing import Annotated, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from billing.catalogue import Catalogue
from billing.plans import Limits
from billing.prices import Price
from billing.store.board import GatewayState
from billing.store.outbox import PumpState, Sums
from billing.tenants import Subscription, Tenant
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


class ReceiptBody(Body):
    record_id: str
    cost_usd: Dollars
    list_usd: Dollars
    balance_usd: Dollars
    price_version: str
    adapter: str
    draws: list[DrawBody]


class ChatMessage(Body):
    role: Literal["assistant"]
    content: str


class ChatChoice(Body):
    index: int
    message: ChatMessage
    logprobs: None
    finish_reason: Literal["stop", "length"]


class TextChoice(Body):
    index: int
    text: str
    logprobs: None
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
    top_up_url: str | None = None
    record_id: str | None = None


class QuoteBody(Body):
    object: Literal["quote"]
    model: str
    adapter: str
    price_version: str
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


class CheckoutBody(Body):
    object: Literal["checkout"]
    checkout_url: str
    session_id: str


class TenantBody(Tenant):
    object: Literal["tenant"]


class TenantWithAccount(TenantBody):
    account: AccountBody


class KeyBody(Body):
    object: Literal["api_key"]
    id: str
    tenant: str
    shown: str
    name: str
    models: list[str] | None
    created_at_ms: int
    expires_at_ms: int | None
    revoked_at_ms: int | None


class NewKeyBody(Body):
    """The secret stands here and nowhere else."""

    api_key: str
    key: KeyBody


class GrantBody(Body):
    granted: bool
    source: str
    unit: Literal["nanos", "requests"]
    amount: int


class AdjustmentBody(Body):
    adjusted: bool
    source: str
    unit: Literal["nanos", "requests"]
    amount: int


class CatalogueBody(Catalogue):
    hash: str
    price_versions: dict[str, str]
    gateway: str


class BillingBody(BaseModel):
    """More may be told from one version to the next."""

    object: Literal["billing"]
    pump: PumpState
    sums: Sums
    backlog: int
    open_holds: int
    unsealed_entries: int
    outbox_events: int
    dead_events: int
    cursors: dict[str, str]
    unsettled_on_this_gateway: int
    refused_settles: int


class EngineBody(BaseModel):
    """The replica's name beside its engine's counters (``EngineStats``)."""

    replica: str
    steps: int
    running: int
    waiting: int
    adapters_resident: list[str]


class DeadLetter(BaseModel):
    id: str
    tenant: str
    name: str
    reason: str


class Received(Body):
    received: Literal[True]


class Alive(Body):
    status: Literal["ok"]


class Checks(Body):
    store: bool
    catalogue: bool
    replica: bool


class Ready(Body):
    status: Literal["ready", "not ready"]
    checks: Checks


GatewayList = Listing[GatewayState]
