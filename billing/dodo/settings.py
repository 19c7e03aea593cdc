"""Which Dodo to talk to, and the secrets for it."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from billing.dodo.errors import DodoMisconfigured
from billing.environment import Environment, read_environment

Mode = Literal["sandbox", "test_mode", "live_mode"]


@dataclass(frozen=True)
class DodoSettings:
    api_key: str = field(repr=False)
    webhook_key: str = field(default="", repr=False)
    environment: Mode = "sandbox"
    base_url: str = ""
    """The sandbox's address; empty for Dodo itself."""

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
        if (self.mode == "sandbox") != bool(self.base_url):
            wanted = "needs DODO_PAYMENTS_BASE_URL" if self.mode == "sandbox" else "forbids DODO_PAYMENTS_BASE_URL"
            raise ValueError(f"FAREBOX_DODO_ENVIRONMENT={self.mode} {wanted}, the address of a sandbox")
        if not self.api_key:
            raise ValueError("DODO_PAYMENTS_API_KEY is not set: create a key in Dodo's dashboard")
        return self
