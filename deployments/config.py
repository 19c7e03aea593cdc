"""The shape of ``serve_config.yaml``'s ``args`` and ``user_config``, checked before anything starts.

Knows names, types and bounds; opens no file and reads no environment.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

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
    """The base model that every adapter sits on."""

    id: str
    path: str
    """Local folder or fsspec URL of an ordinary Hugging Face model folder."""


class EngineConfig(_Config):
    """Sizes of one replica's engine. Tokens and rows are counts, times are seconds."""

    max_context_tokens: Annotated[int, Field(ge=16)] = 512
    max_running: Annotated[int, Field(ge=1, le=1024)] = 16
    """Rows in one batch."""
    max_queued: Annotated[int, Field(ge=1)] = 256
    max_batched_tokens: Annotated[int, Field(ge=16)] = 512
    """Tokens in one step: the decodes and a chunk of prefill."""
    adapter_slots: Annotated[int, Field(ge=1)] = 8
    max_adapter_rank: Annotated[int, Field(ge=8, le=512, multiple_of=8)] = 64
    adapter_host_mb: Annotated[int, Field(ge=16)] = 1024
    device: str = "auto"
    """``auto``, ``cpu`` or ``cuda``."""
    dtype: str = "auto"
    torch_threads: Annotated[int, Field(ge=1)] = 1
    shared_prefixes: bool = False
    """Reuse the start of a prompt between tenants too; each can then tell by the time what others asked."""
    kv_block_tokens: Annotated[int, Field(ge=0)] = 0
    """Tokens in one block of a GPU's KV memory; 0: 32."""
    kv_blocks: Annotated[int, Field(ge=0)] = 0
    """Blocks of a GPU's KV memory; 0: ``max_running`` full contexts. How to choose it: ``EngineSettings``."""


class FareboxArgs(_Config):
    """``args`` of the ``farebox`` application: wiring. A change here restarts every replica."""

    model: BaseModelConfig
    engine: EngineConfig = EngineConfig()
    adapter_cache_dir: str = ".farebox/adapters"
    """Where a replica keeps adapters that it fetched from a URL."""
    spool_dir: str = ".farebox/spool"
    """Where a gateway keeps settles that wait for the store."""
    lease_s: Annotated[float, Field(gt=1)] = 30.0
    checkpoint_s: Annotated[float, Field(gt=0)] = 2.0
    answer_timeout_s: Annotated[float, Field(gt=0)] = 570.0
    """A longer answer is cut, unbilled; below ``http_options.request_timeout_s``, which would bill it as left."""
    hold_step_tokens: Annotated[int, Field(ge=1)] = 256
    """Completion tokens that a request's hold begins with and grows by."""
    hold_step_compute_s: Annotated[int, Field(ge=1)] = 5
    """The same in seconds of compute, for a price that counts them."""
    trusted_proxies: Annotated[int, Field(ge=0, le=8)] = 0
    """Proxies in front of Serve that append to X-Forwarded-For; 0: client addresses are not known, and not counted."""
    max_body_kib: Annotated[int, Field(ge=16, le=3584)] = 1024
    token_transport: Literal["socket", "serve"] = "socket"
    """How tokens travel from replica to gateway: sockets of our own beside the calls, or Serve's streaming calls."""
    durability: Literal["strict", "trusted"] = "strict"
    """``trusted``: a managed store whose settings cannot be read keeps its data, on the operator's word."""
    min_replicas_acked: Annotated[int, Field(ge=0, le=5)] = 0
    """Replicas of the store that must have a settle or a grant before it is acknowledged."""


class BillingArgs(_Config):
    """``args`` of the ``billing`` application."""

    flush_interval_s: Annotated[float, Field(ge=0.2, le=90)] = 60.0
    """At most 90: a subscription's last charges must reach Dodo before its period closes."""
    expire_interval_s: Annotated[float, Field(ge=0.2)] = 5.0
    requests_per_minute: Annotated[int, Field(ge=1)] = 240
    """Calls to Dodo a minute, at most: its default tier allows 240."""
    archive_url: str = ""
    """Where old usage records go as Parquet, a local path or fsspec URL; empty keeps all of them in the store."""
    durability: Literal["strict", "trusted"] = "strict"
    min_replicas_acked: Annotated[int, Field(ge=0, le=5)] = 0


class ModelEntry(_Config):
    """One entry under ``adapters``, or the entry ``base``: what the owner writes."""

    id: str
    price: Price
    path: str = ""
    digest: str = ""
    """Written by ``farebox deploy``; an entry without one is quarantined by the Gateway."""
    visibility: Literal["public"] | tuple[TenantId, ...] = "public"
    """``public``, or the list of tenants that may use it."""
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
