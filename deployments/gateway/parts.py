"""What one gateway is made of: its configuration and its parts, two values that never change.

Both are made here, from ``serve_config.yaml`` and the environment.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Self

from redis.asyncio import Redis

from billing.abuse.addresses import AddressSketches
from billing.catalog.catalog import Catalog
from billing.clock import TOLERANCE_MS
from billing.commerce.context import Commerce
from billing.commerce.links import Links
from billing.commerce.webhooks import Webhooks
from billing.dodo.call_budget import SharedBudget
from billing.dodo.client import Dodo
from billing.dodo.settings import DodoSettings
from billing.ledger.admission import Admission
from billing.ledger.answers import Answers
from billing.ledger.ledger import Ledger
from billing.ledger.replay import Recent, Replay
from billing.ledger.spool import Spool
from billing.store.connection import identity, verify
from billing.tenants.directory import Tenants
from deployments.config import FareboxArgs
from deployments.gateway.catalog_holder import CatalogHolder
from deployments.gateway.load import LoadMeter
from deployments.gateway.metrics import GatewayMetrics
from deployments.gateway.settlement import Settler
from deployments.inference.text import Text
from deployments.token_stream.link import ReplicaLink

DEFAULT_PUBLIC_URL = "http://127.0.0.1:8000"


@dataclass(frozen=True, slots=True)
class GatewayConfig:
    """One gateway's names, limits and times."""

    gateway_id: str
    base_model: str
    max_context_tokens: int
    max_body_bytes: int
    lease_s: float
    """A hold that is not renewed for so long expires; the engine aborts its request after the same time."""
    checkpoint_s: float
    """How often holds are renewed and deadlines extended."""
    answer_timeout_s: float
    trusted_proxies: int
    public_url: str
    admin_key: str
    """Empty switches the admin API off."""

    @classmethod
    def of(cls, args: FareboxArgs, environ: Mapping[str, str], gateway_id: str) -> Self:
        return cls(
            gateway_id=gateway_id,
            base_model=args.model.id,
            max_context_tokens=args.engine.max_context_tokens,
            max_body_bytes=args.max_body_kib * 1024,
            lease_s=args.lease_s,
            checkpoint_s=args.checkpoint_s,
            answer_timeout_s=args.answer_timeout_s,
            trusted_proxies=args.trusted_proxies,
            public_url=environ.get("FAREBOX_PUBLIC_URL", DEFAULT_PUBLIC_URL).rstrip("/"),
            admin_key=environ.get("FAREBOX_ADMIN_KEY", ""),
        )

    @property
    def checkout_url(self) -> str:
        return f"{self.public_url}/v1/checkout"

    @property
    def plan_url(self) -> str:
        return f"{self.public_url}/v1/plan"

    def top_up_url(self, token: str) -> str:
        """The page on which whoever has this link may buy for its tenant."""
        return f"{self.public_url}/top-up/{token}"

    def receipt_url(self, token: str) -> str:
        """The page to come back to after paying."""
        return f"{self.public_url}/paid/{token}"


@dataclass(frozen=True, slots=True)
class GatewayParts:
    """What one gateway works with."""

    redis: Redis
    text: Text
    link: ReplicaLink
    catalog_holder: CatalogHolder
    tenants: Tenants
    ledger: Ledger
    admission: Admission
    answers: Answers
    settler: Settler
    replay: Replay
    load: LoadMeter
    address_sketches: AddressSketches
    metrics: GatewayMetrics
    links: Links
    dodo: Dodo | None
    """``None`` where no payments key is configured: nothing can be bought, everything else works."""
    webhooks: Webhooks | None
    """``None`` where no webhook key is configured: deliveries cannot be verified."""


def build_parts(
    args: FareboxArgs,
    environ: Mapping[str, str],
    *,
    redis: Redis,
    text: Text,
    link: ReplicaLink,
    catalog_holder: CatalogHolder,
) -> GatewayParts:
    """Make a gateway's parts. Raises DodoMisconfigured where payments are half configured."""
    recent, tenants, metrics = Recent(), Tenants(redis), GatewayMetrics()
    ledger = Ledger(redis, on_done=recent.note, clocks_may_differ_ms=TOLERANCE_MS)
    load = LoadMeter(link, catalog_holder, args.engine.max_running)
    lease_ms = int(args.lease_s * 1000)
    admission = Admission(
        ledger,
        lease_ms=lease_ms,
        step_tokens=args.hold_step_tokens,
        step_compute_ms=args.hold_step_compute_s * 1000,
        load=load,
    )

    async def in_force() -> Catalog | None:
        return catalog_holder.current if catalog_holder.has_catalog else None

    settings = DodoSettings.from_env(environ) if environ.get("DODO_PAYMENTS_API_KEY") else None
    dodo = Dodo(settings, on_call=SharedBudget(redis).spend) if settings else None
    webhook_key = environ.get("DODO_PAYMENTS_WEBHOOK_KEY", "")
    webhooks = None
    if dodo is not None and webhook_key:
        webhooks = Webhooks(Commerce(redis, dodo, ledger, tenants, in_force), webhook_key)
    return GatewayParts(
        redis=redis,
        text=text,
        link=link,
        catalog_holder=catalog_holder,
        tenants=tenants,
        ledger=ledger,
        admission=admission,
        answers=Answers(redis, lease_ms=lease_ms),
        settler=Settler(ledger, Spool(Path(args.spool_dir)), metrics),
        replay=Replay(ledger, recent, partial(identity, redis), partial(verify, redis, args.durability)),
        load=load,
        address_sketches=AddressSketches(redis),
        metrics=metrics,
        links=Links(redis),
        dodo=dodo,
        webhooks=webhooks,
    )
