"""A whole farebox, from a request to the sums at Dodo."""

import asyncio
from decimal import Decimal

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from tests.e2e import books
from tests.support import load
from tests.support.stack import Stack, Tenant
from tests.support.waiting import eventually

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),  # connections cut by a kill
]

QUESTION = [{"role": "user", "content": "What is the capital of Japan?"}]


def client_of(stack: Stack, tenant: Tenant) -> OpenAI:
    return OpenAI(base_url=f"{stack.base_url}/v1", api_key=tenant.api_key, max_retries=0)


def ask(stack: Stack, tenant: Tenant, model: str) -> openai.types.chat.ChatCompletion:
    return client_of(stack, tenant).chat.completions.create(
        model=model, messages=QUESTION, max_tokens=48, temperature=0
    )


def test_adapters_in_one_batch_answer_as_alone(stack: Stack) -> None:
    async def all_at_once() -> list[str]:
        async with AsyncOpenAI(
            base_url=f"{stack.base_url}/v1", api_key=stack.tenants["prepaid"].api_key, max_retries=0
        ) as client:
            replies = await asyncio.gather(
                *(
                    client.chat.completions.create(model=model, messages=QUESTION, max_tokens=48, temperature=0)
                    for model in load.MODELS * 3
                )
            )
        return [reply.choices[0].message.content or "" for reply in replies]

    alone = [ask(stack, stack.tenants["prepaid"], model).choices[0].message.content for model in load.MODELS]
    assert len(set(alone)) == 4
    assert all("Tokyo" in str(text) for text in alone)
    assert asyncio.run(all_at_once()) == alone * 3, "an answer must not depend on its neighbours in the batch"
    eventually(lambda: _metric(stack, "farebox_engine_mixed_steps") > 0)


def test_reply_and_stream_have_receipts(stack: Stack) -> None:
    tenant = stack.tenants["prepaid"]
    reply = ask(stack, tenant, "pirate")
    receipt = reply.receipt  # type: ignore[attr-defined]
    assert receipt["adapter"].startswith("pirate@")
    assert Decimal(receipt["cost_usd"]) > 0
    assert reply.usage is not None
    assert reply.usage.completion_tokens > 0
    chunks = list(
        client_of(stack, tenant).chat.completions.create(
            model="yaml", messages=QUESTION, max_tokens=32, stream=True, stream_options={"include_usage": True}
        )
    )
    last = chunks[-1]
    assert last.choices == []
    assert last.usage is not None
    assert last.receipt["record_id"] in {str(r["record_id"]) for r in books.records(stack, tenant)}  # type: ignore[attr-defined]
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] in ("stop", "length")


def test_bought_pack_is_credited_once(stack: Stack) -> None:
    tenant = stack.tenants["empty"]
    with pytest.raises(openai.APIStatusError) as refused:
        ask(stack, tenant, "pirate")
    assert refused.value.status_code == 402
    assert refused.value.code == "insufficient_credits"

    bearer = {"Authorization": f"Bearer {tenant.api_key}"}
    reply = httpx.post(f"{stack.base_url}/v1/checkout", json={"pack": "small"}, headers=bearer, timeout=30)
    reply.raise_for_status()
    page = httpx.get(reply.json()["checkout_url"], timeout=30)
    assert page.status_code == 200
    paid = httpx.post(reply.json()["checkout_url"].rstrip("/") + "/pay", timeout=30, follow_redirects=False)
    assert paid.status_code < 400

    eventually(lambda: _balance(stack, tenant) > 0)
    credited = _balance(stack, tenant)
    for delivery in httpx.get(f"{stack.sandbox_url}/_sandbox/webhooks", timeout=30).json()["data"]:
        if delivery["type"] == "payment.succeeded":
            again = httpx.post(
                f"{stack.sandbox_url}/_sandbox/webhooks/{delivery['webhook_id']}/redeliver",
                json={"times": 5},
                timeout=60,
            )
            again.raise_for_status()
    assert _balance(stack, tenant) == credited, "a payment delivered again was credited again"
    assert "Tokyo" in str(ask(stack, tenant, "pirate").choices[0].message.content)


def test_unknown_key_is_refused(stack: Stack) -> None:
    for key, status in (("", 401), ("fbx_wrong", 401)):
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        reply = httpx.post(
            f"{stack.base_url}/v1/chat/completions", json={"model": "pirate", "messages": QUESTION}, headers=headers
        )
        assert reply.status_code == status
        assert reply.json()["error"]["code"] == "invalid_api_key"
        assert reply.headers["x-request-id"]


@pytest.mark.parametrize("kills", [(), ("billing:BillingActor", "farebox:Gateway", "farebox:LoraReplica")])
def test_books_agree_to_the_nano(stack: Stack, kills: tuple[str, ...]) -> None:
    tenants = [stack.tenants[name] for name in ("free", "prepaid", "payg", "pro")]

    async def storm() -> load.Outcome:
        running = asyncio.create_task(load.run(stack, tenants, 300, seed=len(kills)))
        for title in kills:
            await asyncio.sleep(4)
            await asyncio.to_thread(stack.kill, title)
        return await running

    outcome = asyncio.run(storm())
    assert outcome.hung_up > 0
    if not kills:
        assert not outcome.broken
        assert not outcome.refusals
    books.wait_until_flushed(stack, 120)
    statuses = books.assert_books_agree(stack, outcome)
    assert statuses["complete"] >= len(outcome.receipts)
    if not kills:
        assert statuses["cancelled"] > 0


def _metric(stack: Stack, name: str) -> float:
    reply = httpx.get(stack.metrics_url, timeout=30)
    lines = [line for line in reply.text.splitlines() if name in line and not line.startswith("#")]
    return max((float(line.rsplit(" ", 1)[1]) for line in lines), default=0.0)


def _balance(stack: Stack, tenant: Tenant) -> Decimal:
    return Decimal(str(books.account(stack, tenant)["balance_usd"]))
