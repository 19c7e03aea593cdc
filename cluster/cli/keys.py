"""``farebox keys``: a tenant's API keys, created, listed, rotated and revoked. A secret is printed only once."""

from typing import Annotated

import typer
from pydantic import ValidationError
from redis.asyncio import Redis
from rich.text import Text

from billing.catalog.plans import Limits
from billing.clock import now_ms
from billing.money import AmountError, Nanos, parse_usd
from billing.tenants.directory import Tenants
from billing.tenants.tenant import NEW_KEY_SCOPES, ApiKey, Scope, new_key
from billing.usage import TenantId
from cluster.cli.output import JsonOption, dollars, out, print_json, table, utc
from cluster.cli.target import with_store
from cluster.cli.tenants import DAY_MS, TenantArgument, check_name
from cluster.local.settings import SettingsError

HOUR_MS = 3_600_000

app = typer.Typer(no_args_is_help=True, help="API keys of tenants.")
KeyArgument = Annotated[str, typer.Argument(metavar="KEY", help="A key's id, from `farebox keys list`.")]
Limit = Annotated[int | None, typer.Option(min=1, help="The lower of this and the plan's limit applies.")]


@app.command()
def create(
    tenant: TenantArgument,
    name: Annotated[str, typer.Option(help="A name to show.")] = "",
    models: Annotated[
        list[str] | None, typer.Option("--model", help="A model that it may use; may be repeated (default: all).")
    ] = None,
    daily_cap: Annotated[str, typer.Option(help='US dollars that it may spend in a day, such as "5.00".')] = "",
    monthly_cap: Annotated[str, typer.Option(help='US dollars that it may spend in a month, such as "50.00".')] = "",
    requests_per_minute: Limit = None,
    burst: Limit = None,
    tokens_per_minute: Limit = None,
    concurrent_requests: Limit = None,
    expires_days: Annotated[int | None, typer.Option(min=1, max=3650, help="Days until it expires.")] = None,
    scopes: Annotated[
        list[Scope] | None,
        typer.Option("--scope", help="What it may be used for; may be repeated (default: inference, usage:read)."),
    ] = None,
    manages_keys: Annotated[
        bool, typer.Option("--manages-keys", help="Adds the scope keys:write to the others.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Create a key. Its secret is shown once, now."""
    limits = {
        "requests_per_minute": requests_per_minute,
        "burst": burst,
        "tokens_per_minute": tokens_per_minute,
        "concurrent_requests": concurrent_requests,
    }
    check_name(name)
    wanted = (*(scopes or NEW_KEY_SCOPES), *([Scope.KEYS_WRITE] if manages_keys else []))
    secret, key = new_key(TenantId(tenant), now_ms(), name, tuple(models) if models else None, wanted)
    key = key.model_copy(
        update={
            "limits": _limits(limits),
            "daily_cap": _cap(daily_cap),
            "monthly_cap": _cap(monthly_cap),
            "expires_at_ms": None if expires_days is None else key.created_at_ms + expires_days * DAY_MS,
        }
    )
    with_store(lambda redis: Tenants(redis).add_key(key))
    _print_secret(secret, key, as_json)


def _limits(limits: dict[str, int | None]) -> Limits:
    """Raises SettingsError."""
    try:
        return Limits.model_validate(limits)
    except ValidationError as error:
        raise SettingsError(str(error.errors()[0]["msg"]).removeprefix("Value error, ")) from error


def _cap(text: str) -> Nanos | None:
    """Raises SettingsError."""
    try:
        nanos = parse_usd(text) if text else None
    except AmountError as error:
        raise SettingsError(str(error)) from error
    if nanos is not None and nanos < 0:
        raise SettingsError(f"a cap is not negative, as {text} is: give an amount from 0")
    return nanos


@app.command("list")
def list_(tenant: TenantArgument, as_json: JsonOption = False) -> None:
    """Show a tenant's keys without their secrets, also those that have ended."""
    keys = with_store(lambda redis: _keys(redis, TenantId(tenant)))
    if as_json:
        print_json([_json(key) for key in keys])
        return
    rows = table(
        *("key", "secret", "name", "models", "limits", "daily cap", "monthly cap", "scopes", "created, UTC", "made by"),
        "state",
        right=("daily cap", "monthly cap"),
        prose=("name", "models", "limits", "scopes", "state"),
    )
    for key in keys:
        models = "all" if key.models is None else ", ".join(key.models)
        given = key.limits.model_dump(exclude_none=True)
        limits = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in given.items()) or "the plan's"
        caps = ("" if cap is None else dollars(cap, 2) for cap in (key.daily_cap, key.monthly_cap))
        rest = (", ".join(key.scopes), utc(key.created_at_ms), key.made_by, _state(key))
        rows.add_row(key.id, f"{key.shown}…", key.name, models, limits, *caps, *rest)
    out.print(rows)


async def _keys(redis: Redis, tenant: TenantId) -> list[ApiKey]:
    return await Tenants(redis).keys((await Tenants(redis).get(tenant)).id)


def _state(key: ApiKey) -> Text:
    if key.revoked_at_ms is not None:
        return Text(f"revoked {utc(key.revoked_at_ms)}")
    if not key.is_usable(now_ms()):
        return Text("expired")
    if key.throttled is not None:
        return Text.assemble(("throttled", "red"), f" since {utc(key.throttled.since_ms)}: {key.throttled.detail}")
    return Text("valid" if key.expires_at_ms is None else f"valid until {utc(key.expires_at_ms)}")


@app.command()
def scopes(
    tenant: TenantArgument,
    key: KeyArgument,
    scopes: Annotated[list[Scope], typer.Option("--scope", help="What it may be used for; may be repeated.")],
    as_json: JsonOption = False,
) -> None:
    """Let a key be used for these scopes and nothing else, within a second on every gateway."""
    changed = with_store(lambda redis: Tenants(redis).set_scopes(TenantId(tenant), key, scopes))
    _print(changed, as_json, f"has the scopes {', '.join(changed.scopes)}")


@app.command()
def revoke(tenant: TenantArgument, key: KeyArgument, as_json: JsonOption = False) -> None:
    """Revoke a key for good, within a second on every gateway. Its requests that run are not cancelled."""
    _print(with_store(lambda redis: Tenants(redis).revoke_key(TenantId(tenant), key)), as_json, "is revoked")


@app.command()
def rotate(
    tenant: TenantArgument,
    key: KeyArgument,
    grace_hours: Annotated[int, typer.Option(min=0, max=720, help="Hours that the old secret stays valid.")] = 24,
    as_json: JsonOption = False,
) -> None:
    """Create a key with the same rights, limits and caps; the old one expires after the grace period."""
    secret, created = with_store(lambda redis: Tenants(redis).rotate_key(TenantId(tenant), key, grace_hours * HOUR_MS))
    _print_secret(secret, created, as_json)
    if not as_json:
        out.print(f"{key} expires in {grace_hours} h")


@app.command()
def lift(tenant: TenantArgument, key: KeyArgument, as_json: JsonOption = False) -> None:
    """Lift a key's throttle for at least a day. Revoke or rotate a key that was stolen instead."""
    _print(with_store(lambda redis: Tenants(redis).lift_key(TenantId(tenant), key)), as_json, "is not throttled")


def _print(key: ApiKey, as_json: bool, state: str) -> None:
    if as_json:
        print_json(_json(key))
    else:
        out.print(f"{key.id} {state}")


def _print_secret(secret: str, key: ApiKey, as_json: bool) -> None:
    if as_json:
        print_json({"api_key": secret, "key": _json(key)})
        return
    out.print(f"{key.id} of {key.tenant}; its secret is shown only now:")
    print(secret)


def _json(key: ApiKey) -> dict[str, object]:
    """``quarantine`` is the name of ``throttled`` before 0.2."""
    shown = key.model_dump(mode="json", exclude={"hash"})
    return shown | {"quarantine": shown["throttled"]}
