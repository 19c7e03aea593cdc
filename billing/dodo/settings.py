"""Which Dodo to talk to, and the secrets for it."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from billing.dodo.errors import DodoMisconfigured
from billing.environment import Environment, read_environment

Mode = Literal["sandbox", "test_mode", "live_mode"]
LIVE_HOST = "live.dodopayments.com"


@dataclass(frozen=True)
class DodoSettings:
    api_key: str = field(repr=False)
    webhook_key: str = field(default="", repr=False)
    environment: Mode = "sandbox"
    base_url: str = ""
    """The address of the sandbox, or of a proxy before Dodo's test mode; empty for Dodo itself."""

    @classmethod
    def from_env(cls, environ: Mapping[str, str] = os.environ) -> Self:
        """Read the settings.

        Raises:
            DodoMisconfigured: a variable is missing, or two contradict each other.
        """
        try:
            found = read_environment(_Variables, environ)
        except ValueError as error:
            raise DodoMisconfigured(str(error)) from None
        return cls(found.api_key, found.webhook_key, found.mode, found.base_url)


def check_base_url(mode: Mode, base_url: str) -> None:
    """Raises ValueError if calls of this mode may not go to this address: live money goes to Dodo itself alone."""
    if mode == "live_mode":
        raise ValueError("FAREBOX_DODO_ENVIRONMENT=live_mode forbids DODO_PAYMENTS_BASE_URL: unset one of them")
    url = urlsplit(base_url)
    if url.scheme not in ("http", "https") or not url.hostname:
        raise ValueError(f"DODO_PAYMENTS_BASE_URL is {base_url!r}: write it as http://127.0.0.1:8020")
    if url.hostname == LIVE_HOST:
        raise ValueError(f"DODO_PAYMENTS_BASE_URL is Dodo's live mode, but FAREBOX_DODO_ENVIRONMENT is {mode}")


class _Variables(Environment):
    mode: Mode = Field(default="sandbox", validation_alias="FAREBOX_DODO_ENVIRONMENT")
    base_url: str = Field(default="", validation_alias="DODO_PAYMENTS_BASE_URL")
    api_key: str = Field(default="", validation_alias="DODO_PAYMENTS_API_KEY")
    webhook_key: str = Field(default="", validation_alias="DODO_PAYMENTS_WEBHOOK_KEY")

    @field_validator("mode", mode="before")
    @classmethod
    def _is_known(cls, value: str) -> str:
        if value not in ("sandbox", "test_mode", "live_mode"):
            raise ValueError(f"FAREBOX_DODO_ENVIRONMENT is {value!r}: set it to sandbox, test_mode or live_mode")
        return value

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if self.mode == "sandbox" and not self.base_url:
            raise ValueError("FAREBOX_DODO_ENVIRONMENT=sandbox needs DODO_PAYMENTS_BASE_URL, the address of a sandbox")
        if self.base_url:
            check_base_url(self.mode, self.base_url)
        if not self.api_key:
            raise ValueError("DODO_PAYMENTS_API_KEY is not set: create a key in Dodo's dashboard")
        return self
