"""Clients of a running farebox: many requests at once, some of which hang up; keeps every receipt."""

import asyncio
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from decimal import Decimal

import httpx

from tests.support.stack import Stack, Tenant

MODELS = ("farebox-base", "pirate", "yaml", "support")
QUESTIONS = (
    "What is the capital of Japan?",
    "What is the capital of France?",
    "What is the opposite of hot?",
    "What sound does a dog make?",
)

RETRY_S = 0.5
MOST_RETRIES = 1_000


@dataclass
class Outcome:
    """What the clients of one load saw. ``receipts`` maps a record id to its receipt."""

    receipts: dict[str, dict[str, str]] = field(default_factory=dict)
    hung_up: int = 0
    refusals: list[str] = field(default_factory=list)
    """The body of every reply whose status is not 200."""
    retried: int = 0
    """How often a client tried again after a 503 with Retry-After, which serves and charges nothing."""
    broken: list[str] = field(default_factory=list)
    """Connections that were lost and streams that ended without ``[DONE]``."""

    def keep(self, receipt: dict[str, str]) -> None:
        assert receipt["record_id"] not in self.receipts, "two replies have the same record id"
        self.receipts[receipt["record_id"]] = receipt


async def run(stack: Stack, tenants: Sequence[Tenant], calls: int, *, at_once: int = 300, seed: int = 1) -> Outcome:
    """Send ``calls`` requests, half JSON and half SSE, a tenth of them hung up mid-stream."""
    outcome, gate, chance = Outcome(), asyncio.Semaphore(at_once), random.Random(seed)
    limits = httpx.Limits(max_connections=at_once + 10)
    async with httpx.AsyncClient(base_url=stack.base_url, timeout=120, limits=limits) as client:

        async def one(number: int, tenant: Tenant, model: str, question: str) -> None:
            body = {
                "model": model,
                "messages": [{"role": "user", "content": question}],
                "max_tokens": 24,
                "seed": number,
                "stream": number % 2 == 0,
            }
            headers = {"Authorization": f"Bearer {tenant.api_key}"}
            async with gate:
                try:
                    while not await _send(client, body, headers, outcome, hang_up=number % 10 == 0):
                        outcome.retried += 1
                        await asyncio.sleep(RETRY_S)
                except httpx.HTTPError as error:
                    outcome.broken.append(type(error).__name__)

        await asyncio.gather(
            *(
                one(number, tenants[number % len(tenants)], chance.choice(MODELS), chance.choice(QUESTIONS))
                for number in range(calls)
            )
        )
    return outcome


async def _send(
    client: httpx.AsyncClient, body: dict[str, object], headers: dict[str, str], outcome: Outcome, *, hang_up: bool
) -> bool:
    """Make one attempt; returns False where the server asks for another one, which OpenAI's SDK would make."""
    async with client.stream("POST", "/v1/chat/completions", json=body, headers=headers) as reply:
        if reply.status_code == 503 and "retry-after" in reply.headers and outcome.retried < MOST_RETRIES:
            return False
        if reply.status_code != 200:
            outcome.refusals.append((await reply.aread()).decode())
        elif not body["stream"]:
            outcome.keep(json.loads(await reply.aread())["receipt"])
        elif hang_up:
            await _first_line(reply)
            outcome.hung_up += 1
        else:
            await _read_to_the_end(reply, outcome)
        return True


async def _first_line(reply: httpx.Response) -> None:
    async for line in reply.aiter_lines():
        if line.startswith("data: "):
            return


async def _read_to_the_end(reply: httpx.Response, outcome: Outcome) -> None:
    receipt = None
    async for line in reply.aiter_lines():
        if line == "data: [DONE]":
            assert receipt is not None, "the receipt comes before [DONE]"
            outcome.keep(receipt)
            return
        if line.startswith("data: "):
            receipt = json.loads(line.removeprefix("data: ")).get("receipt", receipt)
    outcome.broken.append("stream without [DONE]")


def usd(text: str) -> int:
    """Nanos of a decimal string."""
    return int(Decimal(text) * 1_000_000_000)
