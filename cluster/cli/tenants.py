"""``farebox tenants``: tenants created, shown, suspended and given credit."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Annotated, TypeVar

import typer
from pydantic import TypeAdapter, ValidationError
from redis.asyncio import Redis
from rich.console import Group
from rich.text import Text

from billing.catalog import publication
from billing.catalog.catalog import Catalog
from billing.clock import now_ms
from billing.commerce.auto_refill.refill import Refill
from billing.commerce.auto_refill.store import Refills
from billing.commerce.context import Commerce
from billing.commerce.plan_changes import PlanChanges
from billing.commerce.products import Products
from billing.dodo.client import Dodo
from billing.dodo.settings import DodoSettings
from billing.ledger.account import Account, Bucket, Grant
from billing.ledger.admission import funding_for, plan_of
from billing.ledger.ledger import Ledger
from billing.money import MAX_GRANT_NANOS, NANOS_PER_CENT, AmountError, format_usd, parse_usd
from billing.tenants.directory import Tenants
from billing.tenants.tenant import Email, Reference, ShownName, Subscription, Tenant, TenantName
from billing.usage import TenantId, Unit
from cluster.cli.output import JsonOption, dollars, err, fields, out, print_json, table, utc
from cluster.cli.target import Target, with_store
from cluster.local.settings import Settings, SettingsError

T = TypeVar("T")

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
        print_json([one.model_dump(mode="json") | _left_json(account) for one, account in found])
        return
    names = ("tenant", "plan", "balance", "requests", "subscription", "state", "email", "Dodo customer")
    rows = table(*names, right=("balance", "requests"))
    for one, account in found:
        subscription = "" if one.subscription is None else one.subscription.status.value
        customer = one.dodo_customer_id or Text("not created yet", "dim")
        state = Text("suspended", "red") if one.suspended else "active"
        has_requests = any(bucket.unit is Unit.REQUESTS for bucket in account.buckets)
        left = (dollars(account.balance_nanos), str(account.requests_left) if has_requests else "")
        rows.add_row(one.id, one.plan, *left, subscription, state, one.email, customer)
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
    """Show a tenant, its subscription, its credit and its auto-refill: why its requests are accepted or refused."""
    found = with_store(lambda redis: _show(redis, TenantId(tenant)))
    if as_json:
        print_json(found.tenant.model_dump(mode="json") | {"account": _account_json(found)})
    else:
        out.print(_account_fields(found))


@dataclass(frozen=True)
class _Shown:
    """What `show` prints of a tenant."""

    tenant: Tenant
    account: Account
    credit_limit_nanos: int
    """In force now: 0 where no subscription extends credit."""
    scheduled_plan: str
    refill: Refill | None


async def _show(redis: Redis, tenant: TenantId) -> _Shown:
    found, catalog = await Tenants(redis).get(tenant), await publication.current(redis)
    limit = funding_for(found, plan_of(found, catalog), now_ms()).credit_limit if catalog else 0
    scheduled = found.subscription.scheduled_product_id if found.subscription is not None else ""
    terms = await Products(redis).terms(scheduled) if scheduled else None
    scheduled_plan = terms.plain_name if terms is not None else scheduled
    account = await _account(redis, found, catalog)
    return _Shown(found, account, limit, scheduled_plan, await Refills(redis).get(tenant))


def _account_fields(shown: _Shown) -> Group:
    tenant, account = shown.tenant, shown.account
    customer = tenant.dodo_customer_id or "not created yet"
    rows = [("tenant", tenant.id), ("plan", tenant.plan), ("email", tenant.email), ("name", tenant.name)]
    rows += [("Dodo customer", customer), ("balance", dollars(account.balance_nanos))]
    rows += [("held", dollars(account.held_nanos)), ("exposure", dollars(account.overage_nanos))]
    rows.append(("credit limit", dollars(shown.credit_limit_nanos)))
    rows += [(bucket.id, _bucket_words(account, bucket)) for bucket in account.buckets]
    if tenant.subscription is not None:
        rows += _subscription_fields(tenant.subscription, shown.scheduled_plan)
    rows.append(("auto-refill", _refill_words(shown.refill)))
    if tenant.suspended:
        rows.append(("state", f"suspended: `farebox tenants resume {tenant.id}`"))
    return fields(rows)


def _bucket_words(account: Account, bucket: Bucket) -> str:
    def amount(units: int) -> str:
        return dollars(units) if bucket.unit is Unit.NANOS else f"{units} request{'' if units == 1 else 's'}"

    if bucket.remaining < 0:
        return f"{amount(-bucket.remaining)} owed: a pack pays it"
    usable = account.usable(bucket)
    unusable = f", of which {amount(usable)} can be used while a debt is open" if usable < bucket.remaining else ""
    ends = "" if bucket.expires_at_ms is None else f", until {utc(bucket.expires_at_ms)}"
    return f"{amount(bucket.remaining)}{ends}{unusable}"


def _subscription_fields(one: Subscription, scheduled_plan: str) -> Iterator[tuple[str, str]]:
    yield "subscription", f"{one.id}, {one.status.value}, for plan {one.plan}"
    yield "period", f"{utc(one.period_start_ms)} to {utc(one.period_end_ms)}"
    if one.cancel_at_period_end:
        yield "ends", f"with this period, {utc(one.period_end_ms)}"
    if one.past_due_ends_at_ms is not None:
        yield "past due", f"its payment is late; it stays until {utc(one.past_due_ends_at_ms)}"
    if scheduled_plan:
        yield "next plan", f"{scheduled_plan}, from {utc(one.period_end_ms)}"
    if why := one.why_paused:
        yield "credit", f"paused because {why}"


def _refill_words(refill: Refill | None) -> str:
    if refill is None:
        return "not set up"
    if not refill.is_on:
        return f"off: {refill.stopped_because or 'switched off by the tenant'}"
    cap = dollars(refill.monthly_cap_cents * NANOS_PER_CENT, 2)
    return f"buys {refill.pack} at {dollars(refill.threshold_nanos, 2)} or less, at most {cap} a month"


def _left_json(account: Account) -> dict[str, object]:
    return {"balance_usd": format_usd(account.balance_nanos), "requests_left": account.requests_left}


def _account_json(shown: _Shown) -> dict[str, object]:
    account, one = shown.account, shown.tenant.subscription
    return {
        **_left_json(account),
        "held_usd": format_usd(account.held_nanos),
        "overage_usd": format_usd(account.overage_nanos),
        "open_holds": account.open_holds,
        "buckets": [asdict(bucket) | {"usable": account.usable(bucket)} for bucket in account.buckets],
        "credit_limit_usd": format_usd(shown.credit_limit_nanos),
        "scheduled_plan": shown.scheduled_plan or None,
        "credit_paused_because": (one.why_paused or None) if one is not None else None,
        "auto_refill": shown.refill.model_dump(mode="json") if shown.refill is not None else None,
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


@app.command("plan")
def change_plan(
    tenant: TenantArgument,
    plan: Annotated[str, typer.Argument(metavar="PLAN", help="A plan of the configuration.")],
    is_preview: Annotated[bool, typer.Option("--preview", help="Only show what it would charge.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask before a subscription is changed.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Move a tenant to another plan. An active subscription is changed at Dodo, which may charge the tenant's card.

    A dearer plan counts at once, less what is left of the period; a cheaper one from the next period on.
    """
    target = Target.find(Settings.from_env())
    if asyncio.run(_is_subscribed(target, tenant, plan)):
        quote = asyncio.run(_at_dodo(target, tenant, lambda changes, found: changes.quote(found, plan)))
        cents = quote.total * NANOS_PER_CENT
        amount = dollars(cents, 2) if quote.currency == "USD" else f"{quote.total} {quote.currency} (minor units)"
        if is_preview and as_json:
            print_json(asdict(quote))
        else:
            line = f"{tenant}'s subscription changes to {plan} on {utc(quote.effective_at_ms)}; {amount} is charged now"
            (err if as_json else out).print(line, soft_wrap=True)
        if is_preview:
            return
        if not yes:
            typer.confirm("Change it?", abort=True, err=True)
        made = asyncio.run(_at_dodo(target, tenant, lambda changes, found: changes.change(found, plan)))
        if as_json:
            print_json(asdict(made))
        else:
            out.print(f"{made.state.value}: {tenant} is on {plan} from {utc(made.effective_at_ms)} on", soft_wrap=True)
        return
    if is_preview:
        out.print(f"{tenant} has no active subscription: nothing is charged")
        return
    moved = with_store(lambda redis: _move(redis, tenant, plan))
    _print(moved, as_json, f"{moved.id} is on plan {moved.plan}")


async def _is_subscribed(target: Target, tenant: str, plan: str) -> bool:
    """Has the tenant an active subscription? Raises SettingsError for a plan that there is not."""
    async with target.store() as redis:
        await _check_plan(redis, plan)
        one = (await Tenants(redis).get(TenantId(tenant))).subscription
        return one is not None and one.is_live(now_ms())


async def _check_plan(redis: Redis, plan: str) -> None:
    catalog = await publication.current(redis)
    plans = catalog.plans if catalog is not None else {}
    if plan not in plans:
        raise SettingsError(f"{plan!r} is not one of the plans {', '.join(sorted(plans))}")


async def _move(redis: Redis, tenant: str, plan: str) -> Tenant:
    return await Tenants(redis).update(TenantId(tenant), lambda one: one.model_copy(update={"plan": plan}))


async def _at_dodo(target: Target, tenant: str, ask: Callable[[PlanChanges, Tenant], Awaitable[T]]) -> T:
    dodo = Dodo(DodoSettings.from_env(target.environment))
    try:
        async with target.store() as redis:
            tenants = Tenants(redis)
            commerce = Commerce(redis, dodo, Ledger(redis), tenants, lambda: publication.current(redis))
            return await ask(PlanChanges(commerce), await tenants.get(TenantId(tenant)))
    finally:
        await dodo.close()


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
    check_value("reference: give 1 to 128 characters without line breaks or tabs", TypeAdapter(Reference), source)
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
