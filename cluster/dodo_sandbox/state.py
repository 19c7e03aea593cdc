"""What every route works on: the store, the clock, the outbox and the settings, given by dependency.

Checks the bearer key. Knows no resource.
"""

import hmac
import json
from dataclasses import dataclass, field
from typing import Annotated, cast

from fastapi import Depends, Request
from pydantic import BaseModel, ConfigDict, Field

from cluster.dodo_sandbox.clock import SandboxClock
from cluster.dodo_sandbox.errors import ApiError
from cluster.dodo_sandbox.outbox import Outbox
from cluster.dodo_sandbox.store import Store

_SETTING = "settings"


class Settings(BaseModel):
    """What an operator may change while the sandbox runs (``POST /_sandbox/settings``)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    webhook_speed: float = Field(default=1.0, gt=0)
    """Dodo's retry delays are divided by this."""
    webhooks_paused: bool = False
    webhook_copies: int = Field(default=1, ge=1, le=100)
    """How often each delivery is sent; Dodo promises at least once."""
    webhooks_shuffled: bool = False
    """Deliveries that are due together go out in a random order."""
    tax_bps: int = Field(default=0, ge=0, le=10_000)
    """Tax on top of every price, in hundredths of a percent."""
    past_due_grace_days: int = Field(default=0, ge=0, le=60)
    """How long a failed renewal leaves its subscription ``past_due``; with 0 it is ``on_hold`` at once."""
    payment_retries: bool = False
    """Charge a failed renewal again on Dodo's schedule; at Dodo, too, this is off until switched on."""
    bill_usage_at_pause: bool = True
    """Invoice what a paused subscription has used; else it stands on its next regular invoice."""
    recovery_window_days: int = Field(default=13, ge=1, le=30)
    dunning: bool = False
    """Tell ``dunning.started`` and ``dunning.recovered``."""
    rate_limit_per_min: int | None = Field(default=None, ge=1)
    """Dodo's Tier 0 has 240; off by default."""
    max_body_bytes: int = Field(default=16_000_000, ge=1)


@dataclass
class Sandbox:
    store: Store
    clock: SandboxClock
    outbox: Outbox
    api_key: str = field(repr=False)
    public_url: str = "http://127.0.0.1:8010"

    @property
    def settings(self) -> Settings:
        return Settings.model_validate_json(self.store.setting(_SETTING) or "{}")

    def change_settings(self, change: dict[str, object]) -> Settings:
        """Raises pydantic's ValidationError for an unknown name or a bad value."""
        settings = Settings.model_validate(json.loads(self.settings.model_dump_json()) | change)
        self.store.set_setting(_SETTING, settings.model_dump_json())
        return settings


async def _sandbox(request: Request) -> Sandbox:
    return cast(Sandbox, request.app.state.sandbox)


Here = Annotated[Sandbox, Depends(_sandbox)]


async def authorize(request: Request, sandbox: Here) -> None:
    """Refuse a request whose bearer key is not the sandbox's, with 401."""
    given = request.headers.get("authorization", "")
    if not hmac.compare_digest(given.encode(), f"Bearer {sandbox.api_key}".encode()):
        raise ApiError(401, "UNAUTHORIZED", "API key is missing or invalid")
