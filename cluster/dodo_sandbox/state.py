"""The state that every route works on: store, clock, outbox, settings and API key."""

import hmac
import json
from dataclasses import dataclass, field
from datetime import datetime
from typing import Annotated, cast

from fastapi import Depends, Request
from pydantic import BaseModel, ConfigDict, Field

from billing.clock import Clock
from cluster.dodo_sandbox.errors import ApiError
from cluster.dodo_sandbox.outbox import Outbox
from cluster.dodo_sandbox.store import Store
from cluster.dodo_sandbox.wire import moment, to_ms

_SETTINGS, _CLOCK_OFFSET = "settings", "clock_offset_ms"
SANDBOX_ONLY_PATHS = ("/_sandbox", "/checkout/", "/portal/")
"""Paths that Dodo's API does not have; limits and faults do not apply to them."""


class Settings(BaseModel):
    """Settings that may be changed while the sandbox runs (``POST /_sandbox/settings``)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    webhook_speed: float = Field(default=1.0, gt=0)
    """Divides the delays between attempts."""
    webhooks_paused: bool = False
    webhook_copies: int = Field(default=1, ge=1, le=100)
    """How often each delivery is sent. Dodo guarantees at least once."""
    webhooks_shuffled: bool = False
    """Send deliveries that are due at the same time in random order."""
    tax_bps: int = Field(default=0, ge=0, le=10_000)
    """Tax that is added to every price, in hundredths of a percent."""
    payment_fee_bps: int = Field(default=0, ge=0, le=10_000)
    """What Dodo keeps of a payment, tax included, in hundredths of a percent."""
    payment_fee_cents: int = Field(default=0, ge=0)
    """What it keeps of each payment besides."""
    refund_fee_cents: int = Field(default=0, ge=0)
    dispute_fee_cents: int = Field(default=0, ge=0)
    payout_fee_cents: int = Field(default=0, ge=0)
    past_due_grace_days: int = Field(default=0, ge=0, le=60)
    """How long a subscription is ``past_due`` after a failed renewal; with 0 it is ``on_hold`` at once."""
    payment_retries: bool = False
    """Retry failed renewals on Dodo's schedule. Off by default, as at Dodo."""
    bill_usage_at_pause: bool = True
    """Invoice usage when a subscription is paused, instead of with its next invoice."""
    recovery_window_days: int = Field(default=13, ge=1, le=30)
    dunning: bool = False
    """Send ``dunning.started`` and ``dunning.recovered``."""
    rate_limit_per_min: int | None = Field(default=None, ge=1)
    """Dodo's Tier 0 has 240; off by default."""
    max_body_bytes: int = Field(default=16_000_000, ge=1)


class SandboxClock:
    """The machine's time plus an offset, which the operator changes and the store keeps.

    Billing periods, renewals and the time window of usage events follow it. Webhooks use real time, since their
    receivers do.
    """

    def __init__(self, store: Store, real: Clock) -> None:
        self._store = store
        self._offset_ms = int(store.setting(_CLOCK_OFFSET) or 0)
        self.real_ms = real

    def now_ms(self) -> int:
        return self.real_ms() + self._offset_ms

    def now(self) -> datetime:
        return moment(self.now_ms())

    def advance(self, delta_ms: int) -> None:
        self._offset_ms += delta_ms
        self._store.set_setting(_CLOCK_OFFSET, str(self._offset_ms))

    def move_to(self, then: datetime) -> None:
        self.advance(to_ms(then) - self.now_ms())


@dataclass
class Sandbox:
    """What every route works on."""

    store: Store
    clock: SandboxClock
    outbox: Outbox
    api_key: str = field(repr=False)
    public_url: str = "http://127.0.0.1:8010"

    @property
    def settings(self) -> Settings:
        return Settings.model_validate_json(self.store.setting(_SETTINGS) or "{}")

    def change_settings(self, change: dict[str, object]) -> Settings:
        """Raises pydantic's ValidationError for an unknown name or a bad value."""
        settings = Settings.model_validate(json.loads(self.settings.model_dump_json()) | change)
        self.store.set_setting(_SETTINGS, settings.model_dump_json())
        return settings


async def _sandbox(request: Request) -> Sandbox:
    return cast(Sandbox, request.app.state.sandbox)


SandboxDep = Annotated[Sandbox, Depends(_sandbox)]


async def authorize(request: Request, sandbox: SandboxDep) -> None:
    """Refuse a request whose bearer key is not the sandbox's, with 401."""
    given = request.headers.get("authorization", "")
    if not hmac.compare_digest(given.encode(), f"Bearer {sandbox.api_key}".encode()):
        raise ApiError(401, "UNAUTHORIZED", "API key is missing or invalid")
