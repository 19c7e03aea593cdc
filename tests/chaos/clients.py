"""Clients that never retry, and the log of what each was told: the receipts that the books must hold."""

import asyncio
import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import httpx

MODELS = ("farebox-base", "pirate", "flat")
TIMEOUT_S = 60.0


@dataclass
class Seen:
    """What the clients of one load were told, in nanos."""

    receipts: dict[str, int] = field(default_factory=dict)
    """Cost by record id, of every reply that was read to its end."""
    tokens: list[int] = field(default_factory=list)
    """Completion tokens of each of those replies."""
    statuses: Counter[int] = field(default_factory=Counter)
    codes: Counter[str] = field(default_factory=Counter)
    """Of refusals."""
    cut: int = 0
    """Replies that broke off, or never began."""

    def keep(self, last: dict[str, Any]) -> None:
        """The reply's last object, or its only one."""
        receipt = last["receipt"]
        assert receipt["record_id"] not in self.receipts, "a record is one request's"
        self.tokens.append(last["usage"]["completion_tokens"])
        self.receipts[receipt["record_id"]] = nanos_of(receipt["cost_usd"])


def nanos_of(usd: str) -> int:
    return int(Decimal(usd) * 1_000_000_000)


def chat(model: str, max_tokens: int, *, is_streamed: bool = False, words: int = 4) -> dict[str, object]:
    message = {"role": "user", "content": " ".join(["word"] * words)}
    return {"model": model, "messages": [message], "max_tokens": max_tokens, "stream": is_streamed}


async def ask(client: httpx.AsyncClient, key: str, body: dict[str, object], seen: Seen) -> None:
    """One request, sent once."""
    headers = {"authorization": f"Bearer {key}"}
    try:
        async with client.stream("POST", "/v1/chat/completions", json=body, headers=headers) as reply:
            seen.statuses[reply.status_code] += 1
            if reply.status_code != 200:
                seen.codes[json.loads(await reply.aread())["error"]["code"]] += 1
            elif body["stream"]:
                await _read_stream(reply, seen)
            else:
                seen.keep(json.loads(await reply.aread()))
    except httpx.TransportError:
        seen.cut += 1


async def _read_stream(reply: httpx.Response, seen: Seen) -> None:
    piece: dict[str, Any] = {}
    async for line in reply.aiter_lines():
        if line == "data: [DONE]":
            seen.keep(piece)
            return
        if line.startswith("data: "):
            piece = json.loads(line.removeprefix("data: "))
    seen.cut += 1


def client_of(url: str, connections: int) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
    return httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S, limits=limits, trust_env=False)


async def ask_until(stopped: asyncio.Event, url: str, keys: Sequence[str], seen: Seen, workers: int, seed: int) -> None:
    """Keep that many clients busy, half of them streaming, until told to stop."""

    async def work(number: int) -> None:
        chance = random.Random(f"{seed}:{number}")
        while not stopped.is_set():
            body = chat(chance.choice(MODELS), chance.randint(1, 16), is_streamed=chance.random() < 0.5)
            await ask(client, chance.choice(keys), body, seen)

    async with client_of(url, workers) as client:
        await asyncio.gather(*(work(number) for number in range(workers)))
