"""``farebox reconcile`` and ``farebox usage`` on a store with usage."""

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import pytest
from redis.asyncio import Redis
from typer.testing import CliRunner

from billing.archive.files import Archive
from billing.store.connection import connect
from billing.store.keys import shard_for
from cluster.cli.main import app
from cluster.local.settings import Settings
from cluster.local.state import Home
from tests.support.movements import ACME

runner = CliRunner()


async def _add(store_url: str, name: str, field: str, by: int) -> None:
    redis: Redis = await connect(store_url)
    await redis.hincrby(name, field, by)
    await redis.aclose()


async def _alter(store_url: str, record_id: str) -> None:
    """Replace a record in the stream by one that is a nano dearer."""
    redis, stream = await connect(store_url), shard_for(ACME).stream
    for entry, fields in await redis.xrange(stream):
        record = json.loads(fields["p"])
        if record.get("record_id") == record_id:
            record["charged_nanos"] += 1
            await redis.xdel(stream, entry)
            await redis.xadd(stream, fields | {"p": json.dumps(record, separators=(",", ":"))})
    await redis.aclose()


@pytest.mark.usefixtures("ledger_with_usage")
def test_reconcile_without_difference_exits_0() -> None:
    done = runner.invoke(app, ["reconcile"])
    assert done.exit_code == 0, done.output
    assert "every proof holds to the nano" in done.output


def test_reconcile_names_an_altered_record(ledger_with_usage: str) -> None:
    asyncio.run(_alter(ledger_with_usage, "rec_req_live"))
    done = runner.invoke(app, ["reconcile"])
    assert done.exit_code == 1
    assert "acme" in done.output
    assert "rec_req_live is not as it was written" in " ".join(done.output.split())


def test_reconcile_finds_missing_archive_files(ledger_with_usage: str, tmp_path: Path) -> None:
    for file in (tmp_path / "archive").glob(f"date=*/s{shard_for(ACME).number:02d}_*.parquet"):
        file.unlink()
    for args in ([], ["--full"]):
        done = runner.invoke(app, ["reconcile", "--json", "--no-dodo", *args])
        assert done.exit_code == 1
        (fault,) = [row for row in json.loads(done.stdout)["drift"] if row["proof"] == "sequence"]
        assert (fault["tenant"], fault["difference"] < 0) == ("acme", True)
        assert "missing between the beginning and rec_req_live" in fault["named"]


def test_reconcile_names_one_nano_of_difference(ledger_with_usage: str) -> None:
    asyncio.run(_add(ledger_with_usage, shard_for(ACME).account(ACME), "overage", 1))
    done = runner.invoke(app, ["reconcile", "--json"])
    assert done.exit_code == 1
    (drift,) = json.loads(done.stdout)["drift"]
    assert (drift["proof"], drift["tenant"], drift["difference"]) == ("exposure", "acme", 1)
    assert "field overage" in runner.invoke(app, ["reconcile", "--no-dodo"]).output


@pytest.mark.usefixtures("ledger_with_usage")
def test_reconcile_without_dodo_exits_2() -> None:
    home = Home(Settings.from_env().home)
    run = home.read_run()
    assert run is not None
    home.write_run(replace(run, sandbox_url="http://127.0.0.1:9"))
    assert runner.invoke(app, ["reconcile"]).exit_code == 2
    assert runner.invoke(app, ["reconcile", "--no-dodo"]).exit_code == 0


def test_usage_has_stream_and_archive(ledger_with_usage: str, tmp_path: Path) -> None:
    rows = json.loads(runner.invoke(app, ["usage", "--json", "--tenant", "acme"]).stdout)
    assert [(row["tenant"], row["group"]) for row in rows] == [("acme", "pirate")]
    archived = Archive(str(tmp_path / "archive")).read(shard_for(ACME), tenant=ACME)
    assert rows[0]["records"] == sum(entry.is_usage for entry in archived) + 1 > 1, "one is in the stream alone"
    assert "pirate" in runner.invoke(app, ["usage"]).output


@pytest.mark.usefixtures("ledger_with_usage")
@pytest.mark.parametrize(
    "args", [["--since", "yesterday"], ["--since", "2026-12-02", "--until", "2026-12-01"], ["--tenant", "unknown"]]
)
def test_usage_refuses_invalid_arguments(args: list[str]) -> None:
    done = runner.invoke(app, ["usage", *args])
    assert done.exit_code == 1
    assert "farebox:" in done.output


def test_reconcile_without_a_farebox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAREBOX_HOME", str(tmp_path))
    done = runner.invoke(app, ["reconcile"])
    assert done.exit_code == 1
    assert "no farebox runs" in done.output
