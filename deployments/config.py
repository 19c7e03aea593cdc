"""The settings of ``serve_config.yaml``: every application's ``args``, and the Gateway's ``user_config``."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from billing.catalog.abuse import Abuse
from billing.catalog.catalog import Model
from billing.catalog.plans import Pack, Plan
from billing.pricing.costs import Costs
from billing.pricing.modifiers import Pricing
from billing.pricing.prices import Price
from billing.usage import Name, TenantId


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class BaseModelConfig(_Config):
    """The base model that every adapter was trained on."""

    id: str
    path: str
    """Local folder or fsspec URL of an ordinary Hugging Face model folder."""


class EngineConfig(_Config):
    """Sizes of one replica's engine, passed to ``EngineSettings``, which documents each and checks them together."""

    max_context_tokens: Annotated[int, Field(ge=16)] = 512
    max_running: Annotated[int, Field(ge=1, le=1024)] = 16
    max_queued: Annotated[int, Field(ge=1)] = 256
    max_batched_tokens: Annotated[int, Field(ge=16)] = 512
    adapter_slots: Annotated[int, Field(ge=1)] = 8
    max_adapter_rank: Annotated[int, Field(ge=8, le=512, multiple_of=8)] = 64
    adapter_host_mb: Annotated[int, Field(ge=16)] = 1024
    device: str = "auto"
    dtype: str = "auto"
    torch_threads: Annotated[int, Field(ge=1)] = 1
    shared_prefixes: bool = False
    kv_block_tokens: Annotated[int, Field(ge=0)] = 0
    kv_blocks: Annotated[int, Field(ge=0)] = 0


class FareboxArgs(_Config):
    """``args`` of the ``farebox`` application. A change here restarts every replica."""

    model: BaseModelConfig
    engine: EngineConfig = EngineConfig()
    adapter_cache_dir: str = ".farebox/adapters"
    """Where adapters that were fetched from a URL are kept, by digest."""
    spool_dir: str = ".farebox/spool"
    """Where a gateway keeps settlements while the store is away."""
    lease_s: Annotated[float, Field(gt=1)] = 30.0
    checkpoint_s: Annotated[float, Field(gt=0)] = 2.0
    answer_timeout_s: Annotated[float, Field(gt=0)] = 570.0
    """A longer answer is stopped, and free. Keep it below ``http_options.request_timeout_s``: where Serve stops a
    request it looks as if the client had disconnected, and is billed."""
    hold_step_tokens: Annotated[int, Field(ge=1)] = 256
    """Completion tokens of the initial hold, and of each extension."""
    hold_step_compute_s: Annotated[int, Field(ge=1)] = 5
    """The same in seconds of compute, where a price counts them."""
    trusted_proxies: Annotated[int, Field(ge=0, le=8)] = 0
    """Proxies in front of Serve that append to X-Forwarded-For; with 0 client addresses are not counted."""
    max_body_kib: Annotated[int, Field(ge=16, le=3584)] = 1024
    token_transport: Literal["socket"] = "socket"
    """Read for one more version: there is no other transport."""
    durability: Literal["strict", "trusted"] = "strict"
    """``trusted`` skips the check of the store's settings, for a managed store that does not show them."""
    min_replicas_acked: Annotated[int, Field(ge=0, le=5)] = 0
    """Replicas of the store that must have a settlement or a grant before it is acknowledged."""

    @field_validator("token_transport", mode="before")
    @classmethod
    def _is_not_serve(cls, value: object) -> object:
        if value == "serve":
            raise ValueError("the transport over Serve's streaming calls is gone: remove this line, sockets are used")
        return value


class BillingArgs(_Config):
    """``args`` of the ``billing`` application."""

    flush_interval_s: Annotated[float, Field(ge=0.2, le=90)] = 60.0
    """At most 90: a subscription's last charges must reach Dodo Payments before its period closes."""
    expire_interval_s: Annotated[float, Field(ge=0.2)] = 5.0
    requests_per_minute: Annotated[int, Field(ge=1)] = 240
    """Most calls to Dodo Payments in a minute: its default tier allows 240."""
    archive_url: str = ""
    """Where old usage records are archived as Parquet, a local path or fsspec URL; empty keeps all in the store."""
    durability: Literal["strict", "trusted"] = "strict"
    min_replicas_acked: Annotated[int, Field(ge=0, le=5)] = 0


class ModelEntry(_Config):
    """One entry under ``adapters``, or the entry ``base``."""

    id: str
    price: Price
    path: str = ""
    digest: str = ""
    """Written by ``farebox deploy``; the Gateway rejects an adapter without one."""
    visibility: Literal["public"] | tuple[TenantId, ...] = "public"
    """``public``, or the tenants that may use it."""
    adapter_class: str = "default"
    pinned: bool = False

    def to_model(self) -> Model:
        tenants = None if isinstance(self.visibility, str) else self.visibility
        return Model(
            id=self.id,
            price=self.price,
            path=self.path,
            digest=self.digest,
            tenants=tenants,
            adapter_class=self.adapter_class,
            pinned=self.pinned,
        )


class GatewayUserConfig(_Config):
    """The Gateway's ``user_config``: everything that may change while it runs."""

    base: ModelEntry
    adapters: tuple[ModelEntry, ...] = ()
    plans: dict[Name, Plan]
    packs: dict[Name, Pack] = {}
    default_plan: Name
    pricing: Pricing = Pricing()
    costs: Costs | None = None
    abuse: Abuse = Abuse()
