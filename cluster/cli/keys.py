"""``farebox keys``: a tenant's API keys; made with bounds, listed, rotated, revoked.

Knows options and tables. A secret is printed once, when it is made.
"""

import json
from datetime import UTC, datetime
from typing import Annotated

import typer
from pydantic import ValidationError
from rich.table import Table

from billing.catalog.plans import Limits
from billing.clock import now_ms
from billing.money import AmountError, Nanos, format_usd, parse_usd
from billing.tenants.directory import Tenants
from billing.tenants.tenant import ApiKey, new_key
from billing.usage import TenantId
from cluster.cli.books import JsonOption, ask, out, store
from cluster.cli.standing import Standing
from cluster.cli.tenants import DAY_MS, TenantArgument
from cluster.local.settings import SettingsError

HOUR_MS = 3_600_000

app = typer.Typer(no_args_is_help=True, help="API keys of tenants.")
KeyArgument = Annotated[str, typer.Argument(metavar="KEY", help="its id, as `farebox keys list` shows it")]
Cap = Annotated[str, typer.Option(help='dollars that it may spend, such as "5.00"')]
Bound = Annotated[int | None, typer.Option(min=1, help="counts where it is lower than the plan's")]


@app.command()
def create(
    tenant: TenantArgument,
    name: Annotated[str, typer.Option(help="for people")] = "",
    models: Annotated[
        list[str] | None, typer.Option("--model", help="that it may use; may repeat [default: all]")
    ] = None,
    daily_cap: Cap = "",
    monthly_cap: Cap = "",
    requests_per_minute: Bound = None,
    burst: Bound = None,
    tokens_per_minute: Bound = None,
    concurrent_requests: Bound = None,
    expires_days: Annotated[int | None, typer.Option(min=1, max=3650)] = None,
    manages_keys: Annotated[bool, typer.Option("--manages-keys", help="it may make and revoke keys")] = False,
    as_json: JsonOption = False,
) -> None:
    """Make a key. Its secret is shown now and never again."""
    bounds = {
        "requests_per_minute": requests_per_minute,
        "burst": burst,
        "tokens_per_minute": tokens_per_minute,
        "concurrent_requests": concurrent_requests,
    }
    caps = {"daily_cap": daily_cap, "monthly_cap": monthly_cap}
    if manages_keys and (models or any(caps.values()) or any(bounds.values())):
        raise typer.BadParameter("--manages-keys takes no model, cap or limit: such a key could make one without")
    secret, made = ask(
        lambda standing: _create(standing, tenant, name, models, bounds, caps, expires_days, manages_keys)
    )
    _print_new(secret, made, as_json)


@app.command("list")
def list_(tenant: TenantArgument, as_json: JsonOption = False) -> None:
    """Show a tenant's keys, those that ended too; never a secret."""
    found = ask(lambda standing: _list(standing, tenant))
    if as_json:
        print(json.dumps([_json(key) for key in found], indent=2))
        return
    table = Table("key", "begins", "name", "models", "limits", "cap a day", "cap a month", "made, UTC", "state")
    for key in found:
        models = "all" if key.models is None else ", ".join(key.models)
        caps = (_dollars(key.daily_cap), _dollars(key.monthly_cap))
        table.add_row(key.id, key.shown, key.name, models, _limits(key), *caps, _day(key.created_at_ms), _state(key))
    out.print(table)


@app.command()
def revoke(tenant: TenantArgument, key: KeyArgument, as_json: JsonOption = False) -> None:
    """End a key for good, within a second everywhere; its running requests end as they would."""
    ended = ask(lambda standing: _revoke(standing, tenant, key))
    if as_json:
        print(json.dumps(_json(ended), indent=2))
    else:
        out.print(f"{ended.id} is revoked", highlight=False)


@app.command()
def rotate(
    tenant: TenantArgument,
    key: KeyArgument,
    grace_hours: Annotated[int, typer.Option(min=0, max=720, help="that the old secret still works")] = 24,
    as_json: JsonOption = False,
) -> None:
    """Make a new secret with the same rights, limits and caps; the old one ends after the grace."""
    secret, made = ask(lambda standing: _rotate(standing, tenant, key, grace_hours))
    _print_new(secret, made, as_json)
    if not as_json:
        out.print(f"{key} ends in {grace_hours} h", highlight=False)


@app.command()
def lift(tenant: TenantArgument, key: KeyArgument, as_json: JsonOption = False) -> None:
    """Lift a key's throttle. It is not throttled again for a day: revoke or rotate one that leaked."""
    lifted = ask(lambda standing: _lift(standing, tenant, key))
    if as_json:
        print(json.dumps(_json(lifted), indent=2))
    else:
        out.print(f"{lifted.id} is not throttled", highlight=False)


async def _lift(standing: Standing, tenant: str, key: str) -> ApiKey:
    async with store(standing) as redis:
        return await Tenants(redis).lift_key(TenantId(tenant), key)


async def _create(
    standing: Standing,
    tenant: str,
    name: str,
    models: list[str] | None,
    bounds: dict[str, int | None],
    caps: dict[str, str],
    expires_days: int | None,
    manages_keys: bool,
) -> tuple[str, ApiKey]:
    secret, key = new_key(TenantId(tenant), now_ms(), name, tuple(models) if models else None)
    expires = None if expires_days is None else key.created_at_ms + expires_days * DAY_MS
    terms = {"limits": _limits_of(bounds), "expires_at_ms": expires, "manages_keys": manages_keys}
    made = key.model_copy(update=terms | {cap: _amount(text) for cap, text in caps.items()})
    async with store(standing) as redis:
        await Tenants(redis).add_key(made)
    return secret, made


async def _list(standing: Standing, tenant: str) -> list[ApiKey]:
    async with store(standing) as redis:
        return await Tenants(redis).keys((await Tenants(redis).get(TenantId(tenant))).id)


async def _revoke(standing: Standing, tenant: str, key: str) -> ApiKey:
    async with store(standing) as redis:
        return await Tenants(redis).revoke_key(TenantId(tenant), key)


async def _rotate(standing: Standing, tenant: str, key: str, grace_hours: int) -> tuple[str, ApiKey]:
    async with store(standing) as redis:
        return await Tenants(redis).rotate_key(TenantId(tenant), key, grace_hours * HOUR_MS)


def _limits_of(bounds: dict[str, int | None]) -> Limits:
    """Raises SettingsError."""
    try:
        return Limits.model_validate(bounds)
    except ValidationError as error:
        raise SettingsError(str(error.errors()[0]["msg"]).removeprefix("Value error, ")) from error


def _amount(text: str) -> Nanos | None:
    """Raises SettingsError."""
    try:
        nanos = parse_usd(text) if text else None
    except AmountError as error:
        raise SettingsError(str(error)) from error
    if nanos is not None and nanos < 0:
        raise SettingsError("a cap is not negative")
    return nanos


def _print_new(secret: str, key: ApiKey, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"api_key": secret, "key": _json(key)}, indent=2))
        return
    out.print(f"{key.id} of {key.tenant}, shown this once:", highlight=False)
    print(secret)


def _json(key: ApiKey) -> dict[str, object]:
    return key.model_dump(mode="json", exclude={"hash"})


def _limits(key: ApiKey) -> str:
    given = key.limits.model_dump(exclude_none=True)
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in given.items()) or "the plan's"


def _dollars(nanos: int | None) -> str:
    return "" if nanos is None else f"${format_usd(nanos, 2)}"


def _day(at_ms: int) -> str:
    return datetime.fromtimestamp(at_ms // 1_000, UTC).strftime("%Y-%m-%d %H:%M")


def _state(key: ApiKey) -> str:
    if key.revoked_at_ms is not None:
        return f"revoked {_day(key.revoked_at_ms)}"
    if not key.is_usable(now_ms()):
        return "expired"
    if key.throttled is not None:
        return f"[red]throttled[/] since {_day(key.throttled.since_ms)}: {key.throttled.detail}"
    word = "works, may manage keys" if key.manages_keys else "works"
    return word if key.expires_at_ms is None else f"{word} until {_day(key.expires_at_ms)}"
