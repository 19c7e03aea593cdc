"""An answer that takes too long is cut by us, and not by a server in front whose cut we would bill."""

import pytest

from billing.money import parse_usd
from billing.usage import Status
from deployments.config import FareboxArgs
from tests.deployments.gateway.api.test_completions import records
from tests.support.gateway import House, events
from tests.support.scripted import ScriptedLink


@pytest.fixture
def args(args: FareboxArgs) -> FareboxArgs:
    return args.model_copy(update={"answer_timeout_s": 0.3})


@pytest.mark.parametrize("pause_s", [0.02, 30], ids=["between tokens", "before the first token"])
async def test_an_answer_beyond_the_limit_is_told_so_and_free(house: House, link: ScriptedLink, pause_s: float) -> None:
    link.length, link.pause_s = 60, pause_s
    reply = await house.chat(await house.tenant(usd="1.00"), max_tokens=50)
    assert (reply.status_code, reply.json()["error"]["code"]) == (504, "timeout")
    assert reply.headers["x-should-retry"] == "false"
    [record] = await records(house)
    assert (record.status, record.charged_nanos) == (Status.FAILED, 0)
    assert link.aborted == [record.request_id]
    assert (await house.balance(), await house.open_holds()) == (parse_usd("1.00"), 0)


async def test_a_stream_beyond_the_limit_says_so_and_pays_for_what_it_delivered(
    house: House, link: ScriptedLink
) -> None:
    link.length, link.pause_s = 60, 0.02
    reply = await house.chat(await house.tenant(usd="1.00"), max_tokens=50, stream=True)
    chunks = events(reply)
    assert chunks[-1]["error"]["code"] == "timeout"
    assert "[DONE]" not in reply.text
    delivered = sum("tok" in str(chunk) for chunk in chunks[:-1])
    [record] = await records(house)
    assert (record.status, record.usage.completion_tokens) == (Status.FAILED, delivered)
    assert 0 < delivered < 50


async def test_an_answer_within_the_limit_is_left_alone(house: House, link: ScriptedLink) -> None:
    link.pause_s = 0.02
    reply = await house.chat(await house.tenant(usd="1.00"))
    assert (reply.status_code, reply.json()["usage"]["completion_tokens"]) == (200, 5)
    [record] = await records(house)
    assert record.status is Status.COMPLETE
