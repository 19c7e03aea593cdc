"""What every process of one farebox finds in its environment: addresses and secrets, nothing else.

Knows which Dodo is meant: the sandbox unless the operator says otherwise, never live by accident.
"""

import os
from collections.abc import Mapping

from cluster.local.settings import Settings, SettingsError
from cluster.local.state import Secrets

SANDBOX, TEST, LIVE = "sandbox", "test_mode", "live_mode"


def dodo_environment(env: Mapping[str, str] = os.environ) -> str:
    """``sandbox``, ``test_mode`` or ``live_mode``.

    Raises:
        SettingsError: another word, or a real Dodo without its key.
    """
    chosen = env.get("FAREBOX_DODO_ENVIRONMENT") or SANDBOX
    if chosen not in (SANDBOX, TEST, LIVE):
        raise SettingsError(f"FAREBOX_DODO_ENVIRONMENT must be {SANDBOX}, {TEST} or {LIVE}, not {chosen!r}")
    if chosen == SANDBOX:
        return chosen
    if not env.get("DODO_PAYMENTS_API_KEY"):
        raise SettingsError(f"FAREBOX_DODO_ENVIRONMENT={chosen} needs DODO_PAYMENTS_API_KEY, from Dodo's dashboard")
    if env.get("DODO_PAYMENTS_BASE_URL"):
        raise SettingsError(f"FAREBOX_DODO_ENVIRONMENT={chosen} and DODO_PAYMENTS_BASE_URL contradict: unset one")
    return chosen


def service_environment(
    settings: Settings, kept: Secrets, store_url: str, env: Mapping[str, str] = os.environ
) -> dict[str, str]:
    """The variables that gateways, replicas, the billing actor and ``farebox`` commands read.

    In sandbox mode a real Dodo key in the operator's shell is left out of every process.
    """
    chosen = dodo_environment(env)
    made = {
        "REDIS_URL": store_url,
        "FAREBOX_HOME": str(settings.home),
        "FAREBOX_ADMIN_KEY": env.get("FAREBOX_ADMIN_KEY") or kept.admin_key,
        "FAREBOX_PUBLIC_URL": env.get("FAREBOX_PUBLIC_URL") or settings.api_url,
        "FAREBOX_DODO_ENVIRONMENT": chosen,
    }
    if chosen == SANDBOX:
        made["DODO_PAYMENTS_API_KEY"] = kept.dodo_api_key
        made["DODO_PAYMENTS_BASE_URL"] = settings.sandbox_url
        made["DODO_PAYMENTS_WEBHOOK_KEY"] = kept.webhook_secret
    else:
        made["DODO_PAYMENTS_API_KEY"] = env["DODO_PAYMENTS_API_KEY"]
        made["DODO_PAYMENTS_WEBHOOK_KEY"] = env.get("DODO_PAYMENTS_WEBHOOK_KEY", "")
    return made


_DROPPED = ("REDIS_URL", "DODO_PAYMENTS_", "RAY_ADDRESS", "RAY_SERVE_ENABLE_HA_PROXY", "RAY_SERVE_THROUGHPUT_OPTIMIZED")


def inherited(env: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The operator's environment less what would point a child at another store, Dodo or cluster."""
    return {name: value for name, value in env.items() if not name.startswith(_DROPPED)}
