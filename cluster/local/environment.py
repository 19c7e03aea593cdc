"""The environment variables of a farebox's processes: addresses and secrets.

The Dodo sandbox is used unless the operator names another environment, so that no process reaches live money by
accident. What the operator named at a start is kept in the farebox's folder, for its owner alone, until it is stopped:
commands on a running farebox use that, and refuse a shell that names another Dodo or store.
"""

import os
import re
from collections.abc import Mapping
from typing import Literal, Self

from pydantic import ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from billing.dodo.settings import check_base_url
from cluster.local.settings import Settings, SettingsError
from cluster.local.state import Home, Secrets, write_private

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
        if chosen != SANDBOX and not self.dodo_payments_api_key:
            raise ValueError(f"FAREBOX_DODO_ENVIRONMENT={chosen} needs DODO_PAYMENTS_API_KEY, from Dodo's dashboard")
        if self.dodo_payments_base_url:
            check_base_url(chosen, self.dodo_payments_base_url)
        return self

    @classmethod
    def kept_in(cls, home: Home) -> Self:
        """What the operator named when the farebox in ``home`` was started.

        A farebox that an earlier version started has kept nothing: then this process's environment counts.
        """
        try:
            return cls.model_validate_json(home.operator.read_text())
        except FileNotFoundError:
            return cls.read()

    def keep_in(self, home: Home) -> None:
        write_private(home.operator, self.model_dump_json(indent=2))

    def refuse_other(self, shell: Mapping[str, str], sandbox_url: str, store_url: str) -> None:
        """Refuse a shell whose variables name another Dodo or store than those that this farebox runs with.

        Variables that are not set name nothing, and a key alone names nothing where the sandbox was started.

        Raises:
            SettingsError: the environment, an address or the key differs; both are named, without passwords.
        """
        ours, key = self.farebox_dodo_environment, self.dodo_payments_api_key
        base_url = self.dodo_payments_base_url or (sandbox_url if ours == SANDBOX else "")
        named = {
            "FAREBOX_DODO_ENVIRONMENT": (shell.get("FAREBOX_DODO_ENVIRONMENT") or ours, ours),
            "DODO_PAYMENTS_BASE_URL": (shell.get("DODO_PAYMENTS_BASE_URL") or base_url, base_url),
            "DODO_PAYMENTS_API_KEY": (shell.get("DODO_PAYMENTS_API_KEY") or key, key)
            if ours != SANDBOX
            else (key, key),
            "REDIS_URL": (shell.get("REDIS_URL") or store_url, store_url),
        }
        other = {name: theirs for name, (theirs, mine) in named.items() if theirs.rstrip("/") != mine.rstrip("/")}
        if not other:
            return
        running = {name: mine for name, (_, mine) in named.items() if name in other}
        raise SettingsError(
            f"this farebox was started with {_shown(running)}, but this shell has {_shown(other)}: "
            f"`unset {' '.join(other)}` to work on the one that runs, or `farebox down` and `farebox up` to start with "
            "the other" + ("; for the farebox of that store, work in another folder" if "REDIS_URL" in other else "")
        )


def _shown(variables: Mapping[str, str]) -> str:
    def shown(name: str, value: str) -> str:
        return _masked(value) if "KEY" in name else without_password(value) or "(unset)"

    return ", ".join(f"{name}={shown(name, value)}" for name, value in variables.items())


def without_password(url: str) -> str:
    """A store's URL with ``***`` for its password, which may be before the host or in the query."""
    return re.sub(r"([?&_]password=)[^&]*", r"\1***", re.sub(r"(://[^:@/]*:).*@", r"\1***@", url))


def _masked(key: str) -> str:
    """The end of a key, by which its owner knows it."""
    return f"…{key[-4:]}" if len(key) >= 16 else "…"


def dodo_environment() -> str:
    """``sandbox``, ``test_mode`` or ``live_mode``. Raises SettingsError."""
    return OperatorEnvironment.read().farebox_dodo_environment


def service_environment(
    settings: Settings, secrets: Secrets, store_url: str, operator: OperatorEnvironment
) -> dict[str, str]:
    """The variables that gateways, replicas, the billing actor and ``farebox`` commands read.

    With the sandbox, a real Dodo key in the operator's shell is passed to no process.
    """
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
            "DODO_PAYMENTS_BASE_URL": operator.dodo_payments_base_url or settings.sandbox_url,
            "DODO_PAYMENTS_WEBHOOK_KEY": secrets.webhook_secret,
        }
    variables |= {
        "DODO_PAYMENTS_API_KEY": operator.dodo_payments_api_key,
        "DODO_PAYMENTS_WEBHOOK_KEY": operator.dodo_payments_webhook_key,
    }
    base_url = operator.dodo_payments_base_url
    return variables | {"DODO_PAYMENTS_BASE_URL": base_url} if base_url else variables


def inherited() -> dict[str, str]:
    """This process's environment without what would lead a child to another store, Dodo or cluster."""
    return {name: value for name, value in os.environ.items() if not name.startswith(_NOT_INHERITED)}
