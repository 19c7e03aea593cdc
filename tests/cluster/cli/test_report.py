"""``farebox report`` and ``farebox price``, as tables and as JSON."""

import asyncio
import json

import pytest
from redis.asyncio import Redis
from typer.testing import CliRunner

from billing.catalog import publication
from billing.catalog.catalog import Catalog
from cluster.cli.main import app
from tests.support.world import CATALOG

runner = CliRunner()


def publish(store_url: str, **more: object) -> None:
    async def run() -> None:
        redis = Redis.from_url(store_url, decode_responses=True)
        await publication.publish(redis, Catalog.model_validate(CATALOG | more), "gateway-1", 0)
        await redis.aclose()

    asyncio.run(run())


def test_report_adds_up_usage(ledger_with_usage: str) -> None:
    publish(ledger_with_usage, costs={"gpu_hour": "2.00"})
    usage = json.loads(runner.invoke(app, ["usage", "--json"]).stdout)
    done = runner.invoke(app, ["report", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["total"]["requests"] == sum(row["requests"] for row in usage) > 0
    assert found["gpu_hour_usd"] == "2.000000"
    assert found["active_tenants"]
    shown = runner.invoke(app, ["report"])
    assert shown.exit_code == 0
    assert "recurring a month" in shown.output
    assert "requests by hour" in shown.output


def test_report_shows_the_arms_of_an_experiment(ledger_with_usage: str) -> None:
    arms = [{"id": "control"}, {"id": "raised", "multiplier": "1.2"}]
    publish(ledger_with_usage, pricing={"experiments": [{"id": "raise", "arms": arms}]})
    found = json.loads(runner.invoke(app, ["report", "--json"]).stdout)
    assert [(one["experiment"], one["arm"]) for one in found["experiments"]] == [
        ("raise", "control"),
        ("raise", "raised"),
    ]
    assert sum(one["requests"] for one in found["experiments"]) == found["total"]["requests"] > 0
    assert [one["usd_per_tenant"] for one in found["experiments"]] == [None, None]
    shown = runner.invoke(app, ["report"]).output
    assert "too few" in shown
    assert "experiment" in shown


def test_report_without_experiments(ledger_with_usage: str) -> None:
    publish(ledger_with_usage)
    assert json.loads(runner.invoke(app, ["report", "--json"]).stdout)["experiments"] == []
    assert "experiment" not in runner.invoke(app, ["report"]).output


def test_report_without_a_catalog_names_the_remedy(ledger_with_usage: str) -> None:
    done = runner.invoke(app, ["report"])
    assert done.exit_code == 1
    assert "deploy a configuration" in done.output


def test_price_from_cost_and_speed() -> None:
    asked = ["price", "--gpu-hour", "3.60", "--tokens-per-second", "1000", "--margin", "60", "--busy", "100"]
    done = runner.invoke(app, [*asked, "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["output_per_1m"] == "2.500000"
    assert "60 % margin" in runner.invoke(app, asked).output


@pytest.mark.parametrize(
    ("asked", "word"),
    [
        (["--gpu-hour", "cheap"], "dollars"),
        (["--margin", "100", "--gpu-hour", "1", "--tokens-per-second", "5"], "equal to 99"),
    ],
)
def test_price_refuses_invalid_arguments(asked: list[str], word: str) -> None:
    done = runner.invoke(app, ["price", *asked])
    assert done.exit_code == 2
    assert word in done.output


def test_price_needs_the_cost_of_a_gpu(ledger_with_usage: str) -> None:
    publish(ledger_with_usage)
    done = runner.invoke(app, ["price", "--tokens-per-second", "1000"])
    assert done.exit_code == 1
    assert "--gpu-hour" in done.output
