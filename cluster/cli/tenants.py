"""``farebox tenants``: who buys, as the store knows them; made, shown, suspended and given credit.

Knows options and tables; what a tenant may draw on is billing's.
"""

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Annotated

import typer
from pydantic import TypeAdapter, ValidationError
from rich.table import Table

from billing.catalog import publication
from billing.clock import now_ms
from billing.ledger.account import Account, Grant
from billing.ledger.admission import funding_for, plan_of
from billing.ledger.ledger import Ledger
from billing.money import AmountError, format_usd, parse_usd
from billing.tenants.directory import Tenants
from billing.tenants.tenant import Email, Tenant, TenantName
from billing.usage import TenantId, Unit
from cluster.cli.books import JsonOption, ask, out, store
from cluster.cli.standing import Standing
from cluster.local.settings import SettingsError

DAY_MS = 24 * 3_600_000

app = typer.Typer(no_args_is_help=True, help="Who buys: tenants, their plans and their credit.")
TenantArgument = Annotated[str, typer.Argument(metavar="TENANT", help="as `farebox tenants list` shows it")]


@app.command()
def create(
    tenant: Annotated[str, typer.Argument(metavar="TENANT", help="its id: lower case, digits, - and _")],
    email: Annotated[str, typer.Option(help="where Dodo sends receipts")],
    name: str = "",
    plan: Annotated[str, typer.Option(help="one of the configuration's [default: its default_plan]")] = "",
    as_json: JsonOption = False,
) -> None:
    """Make a tenant; Dodo learns of it within seconds. `farebox keys create` makes its first key."""
    made = ask(lambda standing: _create(standing, tenant, email, name, plan))
    _print(made, as_json, f"{made.id} is made, on plan {made.plan}")


@app.command("list")
def list_(as_json: JsonOption = False) -> None:
    """Show all tenants."""
    found = ask(_list)
    if as_json:
        print(json.dumps([_json(tenant) for tenant in found], indent=2))
        return
    table = Table("tenant", "plan", "subscription", "email", "Dodo customer", "")
    for one in found:
        subscription = "" if one.subscription is None else one.subscription.status.value
        state = "[red]suspended[/]" if one.suspended else ""
        table.add_row(one.id, one.plan, subscription, one.email, one.dodo_customer_id or "[dim]on its way[/]", state)
    out.print(table)


@app.command()
def show(tenant: TenantArgument, as_json: JsonOption = False) -> None:
    """Show one tenant and its account."""
    found, account = ask(lambda standing: _show(standing, tenant))
    if as_json:
        print(json.dumps(_json(found) | {"account": _account_json(account)}, indent=2))
        return
    table = Table("", "", show_header=False)
    facts = (("tenant", found.id), ("plan", found.plan), ("email", found.email), ("name", found.name))
    money = (("balance", account.balance_nanos), ("held", account.held_nanos), ("unpaid", account.overage_nanos))
    for name, value in (*facts, *((name, f"${format_usd(nanos)}") for name, nanos in money)):
        table.add_row(name, value)
    for bucket in account.buckets:
        is_money = bucket.unit is Unit.NANOS
        left = f"${format_usd(bucket.remaining)}" if is_money else f"{bucket.remaining} requests"
        table.add_row(bucket.id, left)
    if found.suspended:
        table.add_row("state", f"suspended: `farebox tenants resume {found.id}`")
    out.print(table, highlight=False)


@app.command()
def suspend(tenant: TenantArgument, as_json: JsonOption = False) -> None:
    """Refuse its new requests, within a second everywhere; running ones end as they would."""
    changed = ask(lambda standing: _change(standing, tenant, suspended=True))
    _print(changed, as_json, f"{changed.id} is suspended")


@app.command()
def resume(tenant: TenantArgument, as_json: JsonOption = False) -> None:
    """Serve a suspended tenant again."""
    changed = ask(lambda standing: _change(standing, tenant, suspended=False))
    _print(changed, as_json, f"{changed.id} is served")


@app.command()
def grant(
    tenant: TenantArgument,
    source: Annotated[str, typer.Option(help="your reference: the same one twice is one grant")],
    usd: Annotated[str, typer.Option(help='dollars, such as "12.50"')] = "",
    requests: Annotated[int, typer.Option(min=0, help="or a number of requests, whatever their length")] = 0,
    adapters: Annotated[
        list[str] | None, typer.Option("--adapter", help="that the requests are for; may repeat")
    ] = None,
    expires_days: Annotated[int, typer.Option(min=0, max=3650, help="0: never")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Give credit, once per source."""
    is_new, given = ask(
        lambda standing: _grant(
            standing, tenant, lambda: _grant_of(tenant, source, usd, requests, adapters, expires_days)
        )
    )
    if as_json:
        print(json.dumps({"granted": is_new, **asdict(given)}, indent=2))
        return
    amount = f"${format_usd(given.amount)}" if given.unit is Unit.NANOS else f"{given.amount} requests"
    said = f"{tenant} has {amount} more" if is_new else f"nothing changed: {source} was granted before"
    out.print(said, highlight=False)


def _grant_of(
    tenant: str, source: str, usd: str, requests: int, adapters: list[str] | None, expires_days: int
) -> Grant:
    """Raises SettingsError."""
    if bool(usd) == bool(requests) or (usd and adapters):
        raise SettingsError("give either --usd or --requests; --adapter only with --requests")
    try:
        unit, amount = (Unit.NANOS, int(parse_usd(usd))) if usd else (Unit.REQUESTS, requests)
    except AmountError as error:
        raise SettingsError(str(error)) from error
    expires = now_ms() + expires_days * DAY_MS if expires_days else None
    return Grant(f"operator:{source}", TenantId(tenant), unit, amount, expires, tuple(adapters or ()))


def _check(word: str, form: TypeAdapter[str], value: str) -> None:
    """Raises SettingsError."""
    try:
        form.validate_python(value)
    except ValidationError:
        raise SettingsError(f"{value!r} is no {word}") from None


async def _create(standing: Standing, tenant: str, email: str, name: str, plan: str) -> Tenant:
    _check("tenant's id: lower case letters, digits, - and _, at most 63", TypeAdapter(TenantName), tenant)
    _check("address: write it as it@acme.example", TypeAdapter(Email), email)
    async with store(standing) as redis:
        catalog = await publication.current(redis)
        if catalog is None:
            raise SettingsError("nothing is for sale yet: `farebox deploy` a configuration first")
        if plan and plan not in catalog.plans:
            raise SettingsError(f"plan {plan!r} is not one of {', '.join(sorted(catalog.plans))}")
        made = Tenant(
            id=TenantId(tenant), email=email, name=name, plan=plan or catalog.default_plan, created_at_ms=now_ms()
        )
        return await Tenants(redis).create(made)


async def _list(standing: Standing) -> list[Tenant]:
    async with store(standing) as redis:
        return await Tenants(redis).list()


async def _show(standing: Standing, tenant: str) -> tuple[Tenant, Account]:
    async with store(standing) as redis:
        found, catalog = await Tenants(redis).get(TenantId(tenant)), await publication.current(redis)
        funding = funding_for(found, plan_of(found, catalog), now_ms()) if catalog else None
        return found, await Ledger(redis).account(found.id, funding)


async def _change(standing: Standing, tenant: str, suspended: bool) -> Tenant:
    async with store(standing) as redis:
        return await Tenants(redis).update(
            TenantId(tenant), lambda one: one.model_copy(update={"suspended": suspended})
        )


async def _grant(standing: Standing, tenant: str, make: Callable[[], Grant]) -> tuple[bool, Grant]:
    given = make()
    async with store(standing) as redis:
        await Tenants(redis).get(TenantId(tenant))
        return await Ledger(redis).grant(given), given


def _print(tenant: Tenant, as_json: bool, said: str) -> None:
    if as_json:
        print(json.dumps(_json(tenant), indent=2))
    else:
        out.print(said, highlight=False)


def _json(tenant: Tenant) -> dict[str, object]:
    return tenant.model_dump(mode="json")


def _account_json(account: Account) -> dict[str, object]:
    return {
        "balance_usd": format_usd(account.balance_nanos),
        "held_usd": format_usd(account.held_nanos),
        "overage_usd": format_usd(account.overage_nanos),
        "open_holds": account.open_holds,
        "buckets": [asdict(bucket) for bucket in account.buckets],
    }
