"""The environment variables of a farebox's processes: addresses and secrets.

The Dodo sandbox is used unless the operator names another environment, so that no process reaches live money by
accident.
"""

import os
from typing import Literal, Self

from pydantic import ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from cluster.local.settings import Settings, SettingsError
from cluster.local.state import Secrets

SANDBOX: Literal["sandbox"] = "sandbox"
TEST: Literal["test_mode"] = "test_mode"
LIVE: Literal["live_mode"] = "live_mode"

_NOT_INHERITED = (
    "REDIS_URL",
    "DODO_PAYMENTS_",
    "RAY_ADDRESS",
    "RAY_SERVE_ENABLE_HA_PROXY",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED",
)


class OperatorEnvironment(BaseSettings):
    """What the operator may set before a start; each field is the environment variable of the same name."""

    model_config = SettingsConfigDict(env_ignore_empty=True, frozen=True)

    redis_url: str = ""
    farebox_admin_key: str = ""
    farebox_public_url: str = ""
    farebox_dodo_environment: Literal["sandbox", "test_mode", "live_mode"] = SANDBOX
    dodo_payments_api_key: str = ""
    dodo_payments_base_url: str = ""
    dodo_payments_webhook_key: str = ""

    @classmethod
    def read(cls) -> Self:
        """Raises SettingsError for an unknown Dodo environment, or a real one without its key."""
        try:
            return cls()
        except ValidationError as error:
            first = error.errors()[0]
            if first["type"] == "literal_error":
                raise SettingsError(
                    f"FAREBOX_DODO_ENVIRONMENT must be {SANDBOX}, {TEST} or {LIVE}, not {first['input']!r}"
                ) from error
            raise SettingsError(first["msg"].removeprefix("Value error, ")) from error

    @model_validator(mode="after")
    def _has_key_of_real_dodo(self) -> Self:
        chosen = self.farebox_dodo_environment
        if chosen == SANDBOX:
            return self
        if not self.dodo_payments_api_key:
            raise ValueError(f"FAREBOX_DODO_ENVIRONMENT={chosen} needs DODO_PAYMENTS_API_KEY, from Dodo's dashboard")
        if self.dodo_payments_base_url:
            raise ValueError(f"FAREBOX_DODO_ENVIRONMENT={chosen} contradicts DODO_PAYMENTS_BASE_URL: unset one of them")
        return self


def dodo_environment() -> str:
    """``sandbox``, ``test_mode`` or ``live_mode``. Raises SettingsError."""
    return OperatorEnvironment.read().farebox_dodo_environment


def service_environment(settings: Settings, secrets: Secrets, store_url: str) -> dict[str, str]:
    """The variables that gateways, replicas, the billing actor and ``farebox`` commands read.

    With the sandbox, a real Dodo key in the operator's shell is passed to no process.
    """
    operator = OperatorEnvironment.read()
    variables = {
        "REDIS_URL": store_url,
        "FAREBOX_HOME": str(settings.home),
        "FAREBOX_ADMIN_KEY": operator.farebox_admin_key or secrets.admin_key,
        "FAREBOX_PUBLIC_URL": operator.farebox_public_url or settings.api_url,
        "FAREBOX_DODO_ENVIRONMENT": operator.farebox_dodo_environment,
    }
    if operator.farebox_dodo_environment == SANDBOX:
        return variables | {
            "DODO_PAYMENTS_API_KEY": secrets.dodo_api_key,
            "DODO_PAYMENTS_BASE_URL": settings.sandbox_url,
            "DODO_PAYMENTS_WEBHOOK_KEY": secrets.webhook_secret,
        }
    return variables | {
        "DODO_PAYMENTS_API_KEY": operator.dodo_payments_api_key,
        "DODO_PAYMENTS_WEBHOOK_KEY": operator.dodo_payments_webhook_key,
    }


def inherited() -> dict[str, str]:
    """This process's environment without what would lead a child to another store, Dodo or cluster."""
    return {name: value for name, value in os.environ.items() if not name.startswith(_NOT_INHERITED)}
