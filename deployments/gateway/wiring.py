"""Builds one gateway's parts from its configuration and environment, with whatever link it is given."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from redis.asyncio import Redis

from billing.abuse.addresses import AddressSketches
from billing.catalog.catalog import Catalog
from billing.clock import TOLERANCE_MS
from billing.commerce.context import Commerce
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
from deployments.gateway.gateway import Gateway
from deployments.gateway.load import LoadMeter
from deployments.gateway.metrics import GatewayMetrics
from deployments.gateway.services import Services
from deployments.inference.text import Text
from deployments.token_stream.link import ReplicaLink

DEFAULT_PUBLIC_URL = "http://127.0.0.1:8000"


def build_services(
    args: FareboxArgs,
    text: Text,
    redis: Redis,
    link: ReplicaLink,
    catalog_holder: CatalogHolder,
    environ: Mapping[str, str],
    gateway_id: str,
) -> Services:
    """Wire one gateway. Raises DodoMisconfigured where payments are half configured."""
    recent, tenants = Recent(), Tenants(redis)
    ledger = Ledger(redis, on_done=recent.note, clocks_may_differ_ms=TOLERANCE_MS)
    load = LoadMeter(link, catalog_holder, args.engine.max_running)
    gateway = Gateway(
        catalog_holder=catalog_holder,
        text=text,
        tenants=tenants,
        ledger=ledger,
        admission=Admission(
            ledger,
            lease_ms=int(args.lease_s * 1000),
            step_tokens=args.hold_step_tokens,
            step_compute_ms=args.hold_step_compute_s * 1000,
            load=load,
        ),
        spool=Spool(Path(args.spool_dir)),
        replay=Replay(ledger, recent, partial(identity, redis), partial(verify, redis, args.durability)),
        link=link,
        load=load,
        address_sketches=AddressSketches(redis),
        metrics=GatewayMetrics(),
        max_context_tokens=args.engine.max_context_tokens,
        lease_s=args.lease_s,
        checkpoint_s=args.checkpoint_s,
        answer_timeout_s=args.answer_timeout_s,
    )

    async def in_force() -> Catalog | None:
        return catalog_holder.current if catalog_holder.is_stocked else None

    dodo = Dodo(settings, on_call=SharedBudget(redis).spend) if (settings := payments(environ)) else None
    webhook_key = environ.get("DODO_PAYMENTS_WEBHOOK_KEY", "")
    webhooks = None
    if dodo is not None and webhook_key:
        webhooks = Webhooks(Commerce(redis, dodo, ledger, tenants, in_force), webhook_key)
    return Services(
        gateway=gateway,
        redis=redis,
        ledger=ledger,
        tenants=tenants,
        answers=Answers(redis, lease_ms=int(args.lease_s * 1000)),
        dodo=dodo,
        webhooks=webhooks,
        gateway_id=gateway_id,
        base_model=args.model.id,
        admin_key=environ.get("FAREBOX_ADMIN_KEY", ""),
        public_url=environ.get("FAREBOX_PUBLIC_URL", DEFAULT_PUBLIC_URL).rstrip("/"),
        trusted_proxies=args.trusted_proxies,
        max_body_bytes=args.max_body_kib * 1024,
    )


def payments(environ: Mapping[str, str]) -> DodoSettings | None:
    """Dodo's settings, or ``None`` where no key is given at all. Raises DodoMisconfigured."""
    if not environ.get("DODO_PAYMENTS_API_KEY"):
        return None
    return DodoSettings.from_env(environ)
