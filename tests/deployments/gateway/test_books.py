"""From HTTP to Dodo through the real parts: the books are right, and what is altered by hand in the store is named."""

import asyncio
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from redis.asyncio import Redis
from typer.testing import CliRunner, Result

from billing.store.keys import shard_for
from billing.usage import TenantId
from cluster.cli.main import app
from cluster.dodo_sandbox.server import SandboxServer
from cluster.local.settings import Settings
from cluster.local.state import Home, Phase, Run, start_time
from deployments.billing_actor import BillingActor
from deployments.config import BillingArgs
from tests.deployments.gateway.test_endings import hang_up
from tests.support.gateway import House

ACME = TenantId("acme")
STREAM = shard_for(ACME).stream


@pytest.fixture
async def sold(house: House, store_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[House]:
    """A mixed load, all of it told to the offline Dodo by the billing actor, in a folder that says it runs."""
    monkeypatch.setenv("FAREBOX_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "240")
    home = Home.open(Settings.from_env())
    with SandboxServer(tmp_path / "dodo", home.secrets().dodo_api_key) as sandbox:
        home.write_run(_run(store_url, sandbox.url))
        for name, value in {
            "REDIS_URL": store_url,
            "DODO_PAYMENTS_API_KEY": sandbox.api_key,
            "DODO_PAYMENTS_BASE_URL": sandbox.url,
            "FAREBOX_DODO_ENVIRONMENT": "sandbox",
        }.items():
            monkeypatch.setenv(name, value)
        await _load(house)
        actor = BillingActor(BillingArgs(flush_interval_s=0.2))
        await _told(actor)
        monkeypatch.delenv("REDIS_URL")
        yield house
        await actor.close()


def _run(store_url: str, sandbox_url: str) -> Run:
    return Run(
        pid=os.getpid(),
        started=start_time(os.getpid()) or 0.0,
        api_url="http://127.0.0.1:8000",
        dashboard_url="http://127.0.0.1:8265",
        sandbox_url=sandbox_url,
        store_url=store_url,
        config="serve_config.yaml",
        ports_base=10_240,
        haproxy=False,
        phase=Phase.HEALTHY,
    )


async def _load(house: House) -> None:
    """JSON, streams, an allowance, a free model, refusals, and clients that leave."""
    keys = [await house.tenant(), await house.tenant("zeta", "0", "free"), await house.tenant("empty", "0")]
    replies = await asyncio.gather(
        *(
            house.chat(keys[number % 3], stream=number % 2 == 0, model=("pirate", "farebox-base", "gratis")[number % 3])
            for number in range(24)
        )
    )
    assert {reply.status_code for reply in replies} >= {200, 429}
    assert (await house.chat(keys[2])).status_code == 402
    for chunks in (1, 3):
        await hang_up(house, keys[0], chunks)
    await house.settled()


async def _told(actor: BillingActor) -> None:
    async with asyncio.timeout(20):
        while True:
            status = await actor.status()
            if status.backlog.outbox_events == status.backlog.unsealed_entries == 0:
                return
            await asyncio.sleep(0.1)


async def reconcile(*words: str) -> Result:
    return await asyncio.to_thread(CliRunner().invoke, app, ["reconcile", *words])


async def test_after_a_mixed_load_every_proof_holds(sold: House) -> None:
    done = await reconcile()
    assert done.exit_code == 0, done.output
    assert "every proof holds to the nano" in done.output
    shown = json.loads((await reconcile("--json", "--full")).stdout)
    assert shown["is_clean"]
    found = {proof["proof"]: proof["found"] for proof in shown["proofs"]}
    assert found["records"] > 0
    assert found["dodo farebox.usage"] > 0


async def test_a_record_taken_out_altered_and_put_back_exits_1_and_is_named(sold: House) -> None:
    entry, fields = (await sold.redis.xrange(STREAM))[2]
    record = json.loads(fields["p"])
    dearer = fields["p"].replace(
        f'"charged_nanos":{record["charged_nanos"]}', f'"charged_nanos":{record["charged_nanos"] + 1}'
    )
    await sold.redis.xdel(STREAM, entry)
    await sold.redis.xadd(STREAM, fields | {"p": dearer})
    done = await reconcile()
    assert done.exit_code == 1
    assert "acme" in done.output
    assert f"{record['record_id']} is not as it was written" in " ".join(done.output.split())
    drift = json.loads((await reconcile("--json")).stdout)["drift"]
    assert ("records", "acme", 1) in [(row["proof"], row["tenant"], row["difference"]) for row in drift]


async def test_a_nano_in_a_bucket_exits_1_and_names_it(sold: House) -> None:
    key = shard_for(ACME).buckets(ACME)
    await _add_a_nano(sold.redis, key, "test:acme")
    (row,) = json.loads((await reconcile("--json")).stdout)["drift"]
    assert (row["proof"], row["tenant"], row["difference"]) == ("credit", "acme", 1)
    assert "bucket test:acme has" in row["named"]
    assert (await reconcile()).exit_code == 1


async def _add_a_nano(redis: Redis, key: str, bucket: str) -> None:
    unit, remaining, rest = str(await redis.hget(key, bucket)).split("|", 2)
    await redis.hset(key, bucket, f"{unit}|{int(remaining) + 1}|{rest}")
