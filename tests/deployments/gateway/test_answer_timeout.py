"""Answers that take longer than ``answer_timeout_s``."""

import pytest

from billing.money import parse_usd
from billing.usage import Status
from deployments.config import FareboxArgs
from tests.support.gateway import Harness, events
from tests.support.scripted import ScriptedLink


@pytest.fixture
def args(args: FareboxArgs) -> FareboxArgs:
    return args.model_copy(update={"answer_timeout_s": 0.3})


@pytest.mark.parametrize("pause_s", [0.02, 30], ids=["between tokens", "before the first token"])
async def test_answer_that_times_out_is_free(harness: Harness, link: ScriptedLink, pause_s: float) -> None:
    link.length, link.pause_s = 60, pause_s
    reply = await harness.chat(await harness.tenant(usd="1.00"), max_tokens=50)
    assert (reply.status_code, reply.json()["error"]["code"]) == (504, "timeout")
    assert reply.headers["x-should-retry"] == "false"
    [record] = await harness.records()
    assert (record.status, record.charged_nanos) == (Status.FAILED, 0)
    assert link.aborted == [record.request_id]
    assert (await harness.balance(), await harness.open_holds()) == (parse_usd("1.00"), 0)


async def test_stream_that_times_out_is_billed_for_delivered(harness: Harness, link: ScriptedLink) -> None:
    link.length, link.pause_s = 60, 0.02
    reply = await harness.chat(await harness.tenant(usd="1.00"), max_tokens=50, stream=True)
    chunks = events(reply)
    assert chunks[-1]["error"]["code"] == "timeout"
    assert "[DONE]" not in reply.text
    delivered = sum("tok" in str(chunk) for chunk in chunks[:-1])
    [record] = await harness.records()
    assert (record.status, record.usage.completion_tokens) == (Status.FAILED, delivered)
    assert 0 < delivered < 50


async def test_answer_within_timeout_is_complete(harness: Harness, link: ScriptedLink) -> None:
    link.pause_s = 0.02
    reply = await harness.chat(await harness.tenant(usd="1.00"))
    assert (reply.status_code, reply.json()["usage"]["completion_tokens"]) == (200, 5)
    [record] = await harness.records()
    assert record.status is Status.COMPLETE
