"""The books on the command line: exit code 0 when every nano is where it should be, 1 and a name when not."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis.asyncio import Redis
from typer.testing import CliRunner

from billing.archive.archiver import Archiver
from billing.archive.files import Archive
from billing.dodo.client import Dodo
from billing.dodo.settings import DodoSettings
from billing.store.connection import connect
from billing.store.keys import shard_for
from billing.sweep import Sweep
from cluster.cli.main import app
from cluster.dodo_sandbox.server import SandboxServer
from cluster.local.settings import Settings
from cluster.local.state import Home, Run
from tests.support.cli import tell
from tests.support.movements import ACME, House

runner = CliRunner()


@pytest.fixture
def farebox(store_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A folder that tells of a running farebox whose store and sandbox are real."""
    monkeypatch.setenv("FAREBOX_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "200")
    home = Home.open(Settings.from_env())
    with SandboxServer(tmp_path / "dodo", home.secrets().dodo_api_key) as sandbox:
        tell(store_url, sandbox.url)
        asyncio.run(_move(store_url, sandbox, tmp_path / "archive"))
        yield store_url


async def _move(store_url: str, sandbox: SandboxServer, archive: Path) -> None:
    redis, dodo = await connect(store_url), Dodo(DodoSettings(sandbox.api_key, base_url=sandbox.url))
    try:
        await redis.flushall()
        house = House(redis, dodo)
        await house.open()
        await house.move()
        await house.flush()
        await Archiver(redis, Archive(str(archive)), 0).run_once(Sweep("archive"))
        await house.serve("req_live")
    finally:
        await dodo.close()
        await redis.aclose()


async def _add(store_url: str, name: str, field: str, by: int) -> None:
    redis: Redis = await connect(store_url)
    await redis.hincrby(name, field, by)
    await redis.aclose()


async def _alter(store_url: str, record_id: str) -> None:
    """Take one record out and put it back a nano dearer, as somebody with a hand on the store would."""
    redis, stream = await connect(store_url), shard_for(ACME).stream
    for entry, fields in await redis.xrange(stream):
        record = json.loads(fields["p"])
        if record.get("record_id") == record_id:
            record["charged_nanos"] += 1
            await redis.xdel(stream, entry)
            await redis.xadd(stream, fields | {"p": json.dumps(record, separators=(",", ":"))})
    await redis.aclose()


@pytest.mark.usefixtures("farebox")
def test_right_books_exit_0_and_say_so() -> None:
    done = runner.invoke(app, ["reconcile"])
    assert done.exit_code == 0, done.output
    assert "every proof holds to the nano" in done.output


def test_an_altered_record_exits_1_and_is_named_by_tenant_and_id(farebox: str) -> None:
    asyncio.run(_alter(farebox, "rec_req_live"))
    done = runner.invoke(app, ["reconcile"])
    assert done.exit_code == 1
    assert "acme" in done.output
    assert "rec_req_live is not as it was written" in " ".join(done.output.split())


def test_what_left_the_stream_unproved_is_found_by_a_full_pass_and_by_any_other(farebox: str, tmp_path: Path) -> None:
    for file in (tmp_path / "archive").glob(f"date=*/s{shard_for(ACME).number:02d}_*.parquet"):
        file.unlink()
    for args in ([], ["--full"]):
        done = runner.invoke(app, ["reconcile", "--json", "--no-dodo", *args])
        assert done.exit_code == 1
        (fault,) = [row for row in json.loads(done.stdout)["drift"] if row["proof"] == "sequence"]
        assert (fault["tenant"], fault["difference"] < 0) == ("acme", True)
        assert "missing between the beginning and rec_req_live" in fault["named"]


def test_one_nano_exits_1_and_is_named(farebox: str) -> None:
    asyncio.run(_add(farebox, shard_for(ACME).account(ACME), "overage", 1))
    done = runner.invoke(app, ["reconcile", "--json"])
    assert done.exit_code == 1
    (drift,) = json.loads(done.stdout)["drift"]
    assert (drift["proof"], drift["tenant"], drift["difference"]) == ("exposure", "acme", 1)
    assert "field overage" in runner.invoke(app, ["reconcile", "--no-dodo"]).output


@pytest.mark.usefixtures("farebox")
def test_a_dodo_that_is_away_exits_2() -> None:
    home = Home(Settings.from_env().home)
    run = home.run()
    assert run is not None
    home.tell(Run(**{**run.__dict__, "sandbox_url": "http://127.0.0.1:9"}))
    assert runner.invoke(app, ["reconcile"]).exit_code == 2
    assert runner.invoke(app, ["reconcile", "--no-dodo"]).exit_code == 0


def test_usage_adds_up_stream_and_archive(farebox: str, tmp_path: Path) -> None:
    rows = json.loads(runner.invoke(app, ["usage", "--json", "--tenant", "acme"]).stdout)
    assert [(row["tenant"], row["group"]) for row in rows] == [("acme", "pirate")]
    archived = Archive(str(tmp_path / "archive")).read(shard_for(ACME), tenant=ACME)
    assert rows[0]["records"] == sum(entry.is_usage for entry in archived) + 1 > 1, "one is in the stream alone"
    assert "pirate" in runner.invoke(app, ["usage"]).output


@pytest.mark.usefixtures("farebox")
@pytest.mark.parametrize("args", [["usage", "--since", "yesterday"], ["usage", "--tenant", "nobody"]])
def test_what_cannot_be_answered_exits_1_with_a_reason(args: list[str]) -> None:
    done = runner.invoke(app, args)
    assert done.exit_code == 1
    assert "farebox:" in done.output


def test_without_a_farebox_there_are_no_books(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAREBOX_HOME", str(tmp_path))
    done = runner.invoke(app, ["reconcile"])
    assert done.exit_code == 1
    assert "no farebox runs" in done.output
