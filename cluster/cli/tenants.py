"""``farebox tenants``: tenants created, shown, suspended and given credit."""

from dataclasses import asdict
from typing import Annotated

import typer
from pydantic import TypeAdapter, ValidationError
from redis.asyncio import Redis
from rich.console import Group
from rich.text import Text

from billing.catalog import publication
from billing.catalog.catalog import Catalog
from billing.clock import now_ms
from billing.ledger.account import Account, Grant
from billing.ledger.admission import funding_for, plan_of
from billing.ledger.ledger import Ledger
from billing.money import MAX_GRANT_NANOS, AmountError, format_usd, parse_usd
from billing.tenants.directory import Tenants
from billing.tenants.tenant import Email, ShownName, Tenant, TenantName
from billing.usage import TenantId, Unit
from cluster.cli.output import JsonOption, dollars, fields, out, print_json, table
from cluster.cli.target import with_store
from cluster.local.settings import SettingsError

DAY_MS = 24 * 3_600_000

app = typer.Typer(no_args_is_help=True, help="Tenants, their plans and their credit.")
TenantArgument = Annotated[str, typer.Argument(metavar="TENANT", help="A tenant's id, from `farebox tenants list`.")]


@app.command()
def create(
    tenant: Annotated[
        str, typer.Argument(metavar="TENANT", help="Its id: lower case letters, digits, - and _, at most 63.")
    ],
    email: Annotated[str, typer.Option(help="Where Dodo sends receipts.")],
    name: Annotated[str, typer.Option(help="A name to show.")] = "",
    plan: Annotated[str, typer.Option(help="A plan of the configuration (default: its default_plan).")] = "",
    as_json: JsonOption = False,
) -> None:
    """Create a tenant. Its Dodo customer is created within seconds, its first key by `farebox keys create`."""
    created = with_store(lambda redis: _create(redis, tenant, email, name, plan))
    _print(created, as_json, f"{created.id} is created, on plan {created.plan}")


async def _create(redis: Redis, tenant: str, email: str, name: str, plan: str) -> Tenant:
    check_value("tenant's id: it has lower case letters, digits, - and _, at most 63", TypeAdapter(TenantName), tenant)
    check_value("email address: write it as it@acme.example", TypeAdapter(Email), email)
    check_name(name)
    catalog = await publication.current(redis)
    if catalog is None:
        raise SettingsError("there is no catalog yet: deploy a configuration with `farebox deploy` first")
    if plan and plan not in catalog.plans:
        raise SettingsError(f"{plan!r} is not one of the plans {', '.join(sorted(catalog.plans))}")
    chosen = plan or catalog.default_plan
    tenants = Tenants(redis)
    return await tenants.create(
        Tenant(id=TenantId(tenant), email=email, name=name, plan=chosen, created_at_ms=now_ms())
    )


def check_name(name: str) -> None:
    """Raises SettingsError for a name with control characters."""
    check_value("name: leave line breaks, tabs and other control characters out", TypeAdapter(ShownName), name)


def check_value(expected: str, form: TypeAdapter[str], value: str) -> None:
    """Raises SettingsError."""
    try:
        form.validate_python(value)
    except ValidationError:
        raise SettingsError(f"{value!r} is no {expected}") from None


@app.command("list")
def list_(as_json: JsonOption = False) -> None:
    """Show all tenants, each with its balance."""
    found = with_store(_list)
    if as_json:
        balances = ({"balance_usd": format_usd(account.balance_nanos)} for _, account in found)
        print_json([one.model_dump(mode="json") | usd for (one, _), usd in zip(found, balances, strict=True)])
        return
    rows = table("tenant", "plan", "balance", "subscription", "state", "email", "Dodo customer", right=("balance",))
    for one, account in found:
        subscription = "" if one.subscription is None else one.subscription.status.value
        customer = one.dodo_customer_id or Text("not created yet", "dim")
        state = Text("suspended", "red") if one.suspended else "active"
        rows.add_row(one.id, one.plan, dollars(account.balance_nanos), subscription, state, one.email, customer)
    out.print(rows)


async def _list(redis: Redis) -> list[tuple[Tenant, Account]]:
    catalog = await publication.current(redis)
    return [(one, await _account(redis, one, catalog)) for one in await Tenants(redis).list()]


async def _account(redis: Redis, tenant: Tenant, catalog: Catalog | None) -> Account:
    """The account with the allowance that the tenant's next request would find."""
    funding = funding_for(tenant, plan_of(tenant, catalog), now_ms()) if catalog else None
    return await Ledger(redis).account(tenant.id, funding)


@app.command()
def show(tenant: TenantArgument, as_json: JsonOption = False) -> None:
    """Show a tenant and its account."""
    found, account = with_store(lambda redis: _show(redis, TenantId(tenant)))
    if as_json:
        print_json(found.model_dump(mode="json") | {"account": _account_json(account)})
    else:
        out.print(_account_fields(found, account))


async def _show(redis: Redis, tenant: TenantId) -> tuple[Tenant, Account]:
    found, catalog = await Tenants(redis).get(tenant), await publication.current(redis)
    return found, await _account(redis, found, catalog)


def _account_fields(tenant: Tenant, account: Account) -> Group:
    customer = tenant.dodo_customer_id or "not created yet"
    rows = [("tenant", tenant.id), ("plan", tenant.plan), ("email", tenant.email), ("name", tenant.name)]
    rows += [("Dodo customer", customer), ("balance", dollars(account.balance_nanos))]
    rows += [("held", dollars(account.held_nanos)), ("exposure", dollars(account.overage_nanos))]
    for bucket in account.buckets:
        is_money = bucket.unit is Unit.NANOS
        rows.append((bucket.id, dollars(bucket.remaining) if is_money else f"{bucket.remaining} requests"))
    if tenant.suspended:
        rows.append(("state", f"suspended: `farebox tenants resume {tenant.id}`"))
    return fields(rows)


def _account_json(account: Account) -> dict[str, object]:
    return {
        "balance_usd": format_usd(account.balance_nanos),
        "held_usd": format_usd(account.held_nanos),
        "overage_usd": format_usd(account.overage_nanos),
        "open_holds": account.open_holds,
        "buckets": [asdict(bucket) for bucket in account.buckets],
    }


@app.command()
def suspend(tenant: TenantArgument, as_json: JsonOption = False) -> None:
    """Refuse a tenant's new requests, within a second on every gateway. Requests that run are not cancelled."""
    changed = with_store(lambda redis: _change(redis, tenant, is_suspended=True))
    _print(changed, as_json, f"{changed.id} is suspended")


@app.command()
def resume(tenant: TenantArgument, as_json: JsonOption = False) -> None:
    """Accept a suspended tenant's requests again."""
    changed = with_store(lambda redis: _change(redis, tenant, is_suspended=False))
    _print(changed, as_json, f"{changed.id} is no longer suspended")


async def _change(redis: Redis, tenant: str, is_suspended: bool) -> Tenant:
    return await Tenants(redis).update(TenantId(tenant), lambda one: one.model_copy(update={"suspended": is_suspended}))


@app.command()
def grant(
    tenant: TenantArgument,
    source: Annotated[str, typer.Option(help="Your reference. A second grant with the same reference does nothing.")],
    usd: Annotated[str, typer.Option(help='US dollars, such as "12.50".')] = "",
    requests: Annotated[int, typer.Option(min=0, help="Or a number of requests of any length.")] = 0,
    adapters: Annotated[
        list[str] | None, typer.Option("--adapter", help="Which adapter the requests are for; may be repeated.")
    ] = None,
    expires_days: Annotated[int, typer.Option(min=0, max=3650, help="Days until it expires; 0 for never.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Grant credit, once for each reference."""
    given = _grant_of(tenant, source, usd, requests, adapters, expires_days)
    is_new = with_store(lambda redis: _grant(redis, given))
    if as_json:
        print_json({"granted": is_new, **asdict(given)})
    elif is_new:
        amount = dollars(given.amount) if given.unit is Unit.NANOS else f"{given.amount} requests"
        out.print(f"granted {amount} to {tenant}")
    else:
        out.print(f"nothing changed: {source} was granted before")


async def _grant(redis: Redis, given: Grant) -> bool:
    await Tenants(redis).get(given.tenant)
    return await Ledger(redis).grant(given)


def _grant_of(
    tenant: str, source: str, usd: str, requests: int, adapters: list[str] | None, expires_days: int
) -> Grant:
    """Raises SettingsError."""
    if bool(usd) == bool(requests) or (usd and adapters):
        raise SettingsError("give either --usd or --requests, and --adapter only with --requests")
    try:
        unit, amount = (Unit.NANOS, int(parse_usd(usd, MAX_GRANT_NANOS))) if usd else (Unit.REQUESTS, requests)
    except AmountError as error:
        raise SettingsError(str(error)) from error
    expires = now_ms() + expires_days * DAY_MS if expires_days else None
    return Grant(f"operator:{source}", TenantId(tenant), unit, amount, expires, tuple(adapters or ()))


def _print(tenant: Tenant, as_json: bool, message: str) -> None:
    if as_json:
        print_json(tenant.model_dump(mode="json"))
    else:
        out.print(message)
