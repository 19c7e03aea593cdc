"""Where notices are sent, and the secret they are signed with."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

from pydantic import Field, model_validator
from standardwebhooks import Webhook
from standardwebhooks.webhooks import EmptyWebhookSecretError

from billing.environment import Environment, read_environment
from billing.errors import BillingError


class NoticeReceiverMisconfigured(BillingError):
    """The environment names a receiver and no usable secret, or the other way round."""


@dataclass(frozen=True, slots=True)
class NoticeReceiver:
    url: str
    secret: str = field(repr=False)

    @classmethod
    def from_env(cls, environ: Mapping[str, str] = os.environ) -> Self | None:
        """The receiver that ``FAREBOX_NOTICES_URL`` and ``FAREBOX_NOTICES_SECRET`` name; ``None`` without them.

        Raises:
            NoticeReceiverMisconfigured: one of the two is missing or cannot be used.
        """
        try:
            found = read_environment(_Variables, environ)
        except ValueError as error:
            raise NoticeReceiverMisconfigured(str(error)) from None
        return cls(found.url, found.secret) if found.url else None


class _Variables(Environment):
    url: str = Field(default="", validation_alias="FAREBOX_NOTICES_URL")
    secret: str = Field(default="", validation_alias="FAREBOX_NOTICES_SECRET")

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if not self.url and not self.secret:
            return self
        if not self.url.startswith(("http://", "https://")):
            raise ValueError("FAREBOX_NOTICES_URL must be an http or https address")
        try:
            Webhook(self.secret)
        except (ValueError, EmptyWebhookSecretError):
            raise ValueError("FAREBOX_NOTICES_SECRET must be whsec_ followed by base64") from None
        return self
