"""``farebox tenants`` and ``farebox keys`` on a real store."""

import asyncio
import json
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from billing.catalog import publication
from billing.catalog.catalog import Catalog
from billing.catalog.terms import Terms
from billing.clock import now_ms
from billing.commerce.auto_refill.refill import Refill
from billing.commerce.auto_refill.store import Refills
from billing.commerce.products import Products
from billing.ledger.account import Adjustment
from billing.ledger.ledger import Ledger
from billing.store.connection import connect
from billing.tenants.directory import Tenants
from billing.tenants.errors import InvalidKey
from billing.tenants.tenant import Principal, Subscription, Throttle
from billing.usage import TenantId, Unit
from cluster.cli.main import app
from cluster.cli.output import utc
from cluster.cli.tenants import DAY_MS
from tests.support.cli import write_healthy_run

runner = CliRunner()
CATALOG = Catalog.model_validate(
    {
        "models": [{"id": "pirate", "price": {"input_per_1m": "1"}}],
        "plans": {
            "free": {"kind": "free", "allowance": {"usd": "1"}},
            "prepaid": {"kind": "prepaid"},
            "payg": {"kind": "pay_as_you_go", "credit_limit": "5"},
            "club": {
                "kind": "subscription",
                "monthly_price": "9",
                "allowance": {"requests": 400},
                "credit_limit": "5",
            },
            "pro": {"kind": "subscription", "monthly_price": "20", "allowance": {"usd": "25"}, "credit_limit": "5"},
        },
        "default_plan": "prepaid",
    }
)


@pytest.fixture
def farebox(store_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The store of a running farebox with a catalog and no tenants."""
    monkeypatch.setenv("FAREBOX_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "300")
    write_healthy_run(store_url)

    async def publish() -> None:
        redis = await connect(store_url)
        await redis.flushall()
        await publication.publish(redis, CATALOG, "gateway-1", 0)
        await redis.aclose()

    asyncio.run(publish())
    return store_url


def call(*words: str) -> Result:
    return runner.invoke(app, list(words))


def json_of(*words: str) -> dict[str, object]:
    result = call(*words, "--json")
    assert result.exit_code == 0, result.output
    return dict(json.loads(result.stdout))


def refused(*words: str) -> str:
    result = call(*words)
    assert result.exit_code in (1, 2), result.output
    return result.output


def principal(store_url: str, secret: object) -> Principal:
    async def read() -> Principal:
        redis = await connect(store_url)
        try:
            return await Tenants(redis).principal(str(secret))
        finally:
            await redis.aclose()

    return asyncio.run(read())


def test_tenant_is_created_suspended_and_resumed(farebox: str) -> None:
    made = json_of("tenants", "create", "acme", "--email", "it@acme.example")
    assert (made["id"], made["plan"], made["suspended"]) == ("acme", "prepaid", False)
    assert json_of("tenants", "suspend", "acme")["suspended"] is True
    assert "suspended" in call("tenants", "list").output
    assert "farebox tenants resume acme" in call("tenants", "show", "acme").output
    assert json_of("tenants", "resume", "acme")["suspended"] is False
    assert json.loads(call("tenants", "list", "--json").stdout)[0]["email"] == "it@acme.example"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("acme", "--email", "nowhere"), "it@acme.example"),
        (("Acme!", "--email", "it@acme.example"), "lower case"),
        (("acme", "--email", "it@acme.example", "--plan", "gold"), "club, free, payg, prepaid, pro"),
    ],
)
def test_invalid_tenant_names_the_remedy(farebox: str, words: tuple[str, ...], message: str) -> None:
    assert message in refused("tenants", "create", *words)


@pytest.mark.parametrize("name", ["two\nlines", "a\ttab", "\x1b[31mred", "\x85", "\u2028"])
def test_name_with_control_characters_is_refused(farebox: str, name: str) -> None:
    assert "control characters" in refused("tenants", "create", "acme", "--email", "it@acme.example", "--name", name)
    json_of("tenants", "create", "acme", "--email", "it@acme.example", "--name", "Ünï 🏴‍☠️ GmbH")
    assert "control characters" in refused("keys", "create", "acme", "--name", name)


def test_list_shows_balances(farebox: str) -> None:
    for tenant in ("acme", "globex"):
        json_of("tenants", "create", tenant, "--email", f"it@{tenant}.example")
    json_of("tenants", "grant", "acme", "--source", "mail-7", "--usd", "12.50")
    call("tenants", "suspend", "globex")
    heading, *rows = [line.split() for line in call("tenants", "list").output.splitlines()]
    assert heading == ["tenant", "plan", "balance", "requests", "subscription", "state", "email", "Dodo", "customer"]
    shown = [row[:5] for row in rows]
    assert shown == [
        ["acme", "prepaid", "$12.500000", "active", "it@acme.example"],
        ["globex", "prepaid", "$0.000000", "suspended", "it@globex.example"],
    ]
    listed = json.loads(call("tenants", "list", "--json").stdout)
    assert [one["balance_usd"] for one in listed] == ["12.500000", "0.000000"]
    json_of("tenants", "grant", "globex", "--source", "mail-8", "--requests", "397")
    cells = [line.split()[:4] for line in call("tenants", "list").output.splitlines()]
    assert cells[2] == ["globex", "prepaid", "$0.000000", "397"]
    assert json.loads(call("tenants", "list", "--json").stdout)[1]["requests_left"] == 397


def test_show_explains_why_a_subscriber_is_refused(farebox: str) -> None:
    json_of("tenants", "create", "acme", "--email", "it@acme.example", "--plan", "club")
    now = now_ms()
    period = {"period_start_ms": now - DAY_MS, "period_end_ms": now + DAY_MS}
    club = Terms.of_plan("club", CATALOG.plans["club"])
    fields = {"id": "sub_1", "plan": "club", "status": "active", "sold": club, "scheduled_product_id": "pdt_pro"}
    one = Subscription.model_validate(fields | period | {"credit_paused": {"dispute:dp_7": 0}})
    refill = Refill(pack="small", threshold_nanos=1_000_000_000, monthly_cap_cents=2_000)

    async def put() -> None:
        redis = await connect(farebox)
        await Products(redis).add("pdt_pro", Terms.of_plan("pro", CATALOG.plans["pro"]))
        acme = TenantId("acme")
        await Tenants(redis).update(acme, lambda t: t.model_copy(update={"subscription": one}))
        await Refills(redis).put(acme, refill)
        await Ledger(redis).adjust(Adjustment("adjustment:1", acme, Unit.REQUESTS, -3, "granted twice"))
        await redis.aclose()

    asyncio.run(put())
    shown = call("tenants", "show", "acme").output
    for words in (
        "sub_1, active, for plan club",
        utc(one.period_end_ms),
        "credit limit",
        "400 requests, until",
        "of which 397 requests can be used",
        "3 requests owed: a pack pays it",
        "paused because its fee is disputed (dp_7), until that is decided",
        f"pro, from {utc(one.period_end_ms)}",
        "buys small at $1.00 or less, at most $20.00 a month",
    ):
        assert words in shown, shown
    account = json_of("tenants", "show", "acme")["account"]
    assert isinstance(account, dict)
    assert (account["scheduled_plan"], account["credit_limit_usd"]) == ("pro", "0.000000")
    assert "dp_7" in account["credit_paused_because"]
    assert account["auto_refill"]["pack"] == "small"


def test_tenant_is_not_created_twice(farebox: str) -> None:
    json_of("tenants", "create", "acme", "--email", "it@acme.example")
    assert "exists already" in refused("tenants", "create", "acme", "--email", "other@acme.example")
    assert "does not exist" in refused("tenants", "show", "globex")


def test_grant_is_idempotent(farebox: str) -> None:
    json_of("tenants", "create", "acme", "--email", "it@acme.example")
    given = ("tenants", "grant", "acme", "--source", "mail-7", "--usd", "12.50")
    assert json_of(*given)["granted"] is True
    assert json_of(*given)["granted"] is False
    assert "granted before" in call(*given).output
    json_of("tenants", "grant", "acme", "--source", "mail-8", "--requests", "5", "--adapter", "pirate")
    shown = json_of("tenants", "show", "acme")["account"]
    assert isinstance(shown, dict)
    assert shown["balance_usd"] == "12.500000"
    assert [bucket["adapters"] for bucket in shown["buckets"]] == [[], ["pirate"]]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--source", "a"), "either --usd or --requests"),
        (("--source", "a", "--usd", "1", "--requests", "1"), "either --usd or --requests"),
        (("--source", "a", "--usd", "1", "--adapter", "x"), "--adapter only with --requests"),
        (("--source", "a", "--usd", "a lot"), "12.50"),
        (("--source", "n\nl", "--usd", "1"), "without line breaks"),
        (("--source", "red\x1b[31m", "--requests", "1"), "without line breaks"),
        (("--source", "", "--usd", "1"), "1 to 128 characters"),
        (("--source", "a", "--usd", "2000000"), "too large: the most is 1000000.00 dollars"),
        (("--source", "a", "--usd", "99999999999"), "too large: the most is 1000000.00 dollars"),
        (("--source", "a", "--usd", "0.00"), "is nothing, or more than the"),
    ],
)
def test_invalid_grant_is_explained(farebox: str, words: tuple[str, ...], message: str) -> None:
    json_of("tenants", "create", "acme", "--email", "it@acme.example")
    assert message in " ".join(refused("tenants", "grant", "acme", *words).split())


def test_secret_is_shown_once(farebox: str) -> None:
    json_of("tenants", "create", "acme", "--email", "it@acme.example")
    made = json_of("keys", "create", "acme", "--name", "ci", "--model", "pirate", "--daily-cap", "5", "--burst", "3",
                "--requests-per-minute", "30", "--expires-days", "7")  # fmt: skip
    owner = principal(farebox, made["api_key"])
    assert (owner.tenant.id, owner.key.models, owner.key.daily_cap) == ("acme", ("pirate",), 5_000_000_000)
    assert (owner.key.limits.requests_per_minute, owner.key.limits.burst) == (30, 3)
    listed = call("keys", "list", "acme")
    assert "$5.00" in listed.output
    assert "requests per minute 30" in listed.output
    assert str(made["api_key"]) not in listed.output + call("keys", "list", "acme", "--json").output


def test_scopes_are_chosen_and_changed(farebox: str) -> None:
    json_of("tenants", "create", "acme", "--email", "it@acme.example")
    plain, buyer = (
        json_of("keys", "create", "acme", *words)
        for words in ((), ("--scope", "billing:write", "--scope", "inference", "--manages-keys"))
    )
    assert principal(farebox, plain["api_key"]).key.scopes == ("inference", "usage:read")
    assert principal(farebox, buyer["api_key"]).key.scopes == ("inference", "keys:write", "billing:write")
    key = principal(farebox, buyer["api_key"]).key.id
    changed = json_of("keys", "scopes", "acme", key, "--scope", "billing:read")
    assert (changed["scopes"], changed["manages_keys"], changed["made_by"]) == (["billing:read"], False, "admin")
    assert principal(farebox, buyer["api_key"]).key.scopes == ("billing:read",)
    listed = json.loads(call("keys", "list", "acme", "--json").stdout)
    assert {key["made_by"] for key in listed} == {"admin"}
    capped = dict(json_of("keys", "create", "acme", "--daily-cap", "1")["key"])["id"]  # type: ignore[call-overload]
    assert "takes no spend cap" in " ".join(
        refused("keys", "scopes", "acme", capped, "--scope", "billing:read").split()
    )
    assert "does not exist" in refused("keys", "scopes", "acme", "key_none", "--scope", "inference")


def test_rotated_and_revoked_keys(farebox: str) -> None:
    json_of("tenants", "create", "acme", "--email", "it@acme.example")
    old = json_of("keys", "create", "acme", "--monthly-cap", "9")
    key = dict(old["key"])["id"]  # type: ignore[call-overload]
    new = json_of("keys", "rotate", "acme", key, "--grace-hours", "1")
    assert principal(farebox, old["api_key"]).key.expires_at_ms is not None
    fresh = principal(farebox, new["api_key"]).key
    assert (fresh.counts_as, fresh.monthly_cap) == (key, 9_000_000_000)
    json_of("keys", "rotate", "acme", fresh.id, "--grace-hours", "0")
    with pytest.raises(InvalidKey, match="expired"):
        principal(farebox, new["api_key"])
    assert "it has ended" in refused("keys", "rotate", "acme", fresh.id)
    assert json_of("keys", "revoke", "acme", key)["revoked_at_ms"]
    with pytest.raises(InvalidKey, match="revoked"):
        principal(farebox, old["api_key"])
    assert "does not exist" in refused("keys", "revoke", "acme", "key_none")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--manages-keys", "--daily-cap", "1"), "takes no model"),
        (("--scope", "billing:write", "--daily-cap", "1"), "takes no spend cap"),
        (("--scope", "billing"), "billing:write"),
        (("--burst", "3"), "requests_per_minute"),
        (("--daily-cap", "lots"), "12.50"),
        (("--daily-cap", "-1"), "not negative"),
    ],
)
def test_invalid_key_is_explained(farebox: str, words: tuple[str, ...], message: str) -> None:
    json_of("tenants", "create", "acme", "--email", "it@acme.example")
    assert message in " ".join(refused("keys", "create", "acme", *words).split())


def test_throttled_key_is_listed_and_lifted(farebox: str) -> None:
    json_of("tenants", "create", "acme", "--email", "it@acme.example")
    made = json_of("keys", "create", "acme")
    owner = principal(farebox, made["api_key"]).key

    async def put() -> None:
        redis = await connect(farebox)
        why = Throttle(reason="many_addresses", detail="about 120 client addresses this hour", since_ms=1)
        await Tenants(redis).change_key(owner.tenant, owner.id, lambda one: one.model_copy(update={"throttled": why}))
        await redis.aclose()

    asyncio.run(put())
    assert "about 120 client addresses" in " ".join(call("keys", "list", "acme").output.replace("│", "").split())
    lifted = json_of("keys", "lift", "acme", owner.id)
    assert (lifted["throttled"], lifted["quarantine"]) == (None, None)
    assert principal(farebox, made["api_key"]).key.throttled is None
