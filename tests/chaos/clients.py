"""Clients that never retry, and a log of the replies they got: the receipts that the books must hold."""

import asyncio
import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import httpx

MODELS = ("farebox-base", "pirate", "flat")
NOT_OURS = "not ours"
"""The code of a reply that did not come from a gateway but from the proxy in front."""
TIMEOUT_S = 60.0
PAUSE_S = 0.1
"""How long a client waits after a refusal or a broken reply before its next request."""


@dataclass
class Seen:
    """What the clients of one load received, in nanos."""

    receipts: dict[str, int] = field(default_factory=dict)
    """Cost by record id, for every reply that was read to its end."""
    tokens: list[int] = field(default_factory=list)
    """Completion tokens of each of those replies."""
    statuses: Counter[int] = field(default_factory=Counter)
    codes: Counter[str] = field(default_factory=Counter)
    """Error codes of refusals."""
    cut: int = 0
    """Replies that broke off or never began."""
    streaming: int = 0
    """Streams that a client is reading now."""
    begun: int = 0
    """Streams whose first token has arrived."""

    def keep(self, last: dict[str, Any]) -> None:
        """Keep the receipt of a reply's last JSON object, or its only one."""
        receipt = last["receipt"]
        assert receipt["record_id"] not in self.receipts, "a record is one request's"
        self.tokens.append(last["usage"]["completion_tokens"])
        self.receipts[receipt["record_id"]] = nanos_of(receipt["cost_usd"])


def nanos_of(usd: str) -> int:
    return int(Decimal(usd) * 1_000_000_000)


def chat(model: str, max_tokens: int, *, is_streamed: bool = False, words: int = 4) -> dict[str, object]:
    message = {"role": "user", "content": " ".join(["word"] * words)}
    return {"model": model, "messages": [message], "max_tokens": max_tokens, "stream": is_streamed}


def any_chat(chance: random.Random) -> dict[str, object]:
    """A random request; half of them stream."""
    return chat(chance.choice(MODELS), chance.randint(1, 16), is_streamed=chance.random() < 0.5)


async def ask(client: httpx.AsyncClient, key: str, body: dict[str, object], seen: Seen) -> bool:
    """Send one request once; returns whether it was admitted."""
    headers = {"authorization": f"Bearer {key}"}
    try:
        async with client.stream("POST", "/v1/chat/completions", json=body, headers=headers) as reply:
            seen.statuses[reply.status_code] += 1
            if reply.status_code != 200:
                seen.codes[_code_of(await reply.aread())] += 1
            elif body["stream"]:
                await _read_stream(reply, seen)
            else:
                seen.keep(json.loads(await reply.aread()))
            return reply.status_code == 200
    except httpx.TransportError:
        seen.cut += 1
        return False


async def _read_stream(reply: httpx.Response, seen: Seen) -> None:
    piece: dict[str, Any] = {}
    has_begun = False
    try:
        event = ""
        async for line in reply.aiter_lines():
            event, ended = line, "" if line else event  # an event counts once the empty line behind it has come
            if ended == "data: [DONE]":
                seen.keep(piece)
                return
            if ended.startswith("data: "):
                piece = json.loads(ended.removeprefix("data: "))
                if not has_begun and _has_text(piece):
                    has_begun = True
                    seen.begun += 1
                    seen.streaming += 1
    finally:
        seen.streaming -= has_begun
    seen.cut += 1


def _has_text(piece: dict[str, Any]) -> bool:
    return any(choice["delta"].get("content") for choice in piece.get("choices", ()))


def _code_of(body: bytes) -> str:
    """The code of a refusal, or ``NOT_OURS`` where the body is not a gateway's."""
    try:
        return str(json.loads(body)["error"]["code"])
    except (ValueError, KeyError, TypeError):
        return NOT_OURS


def client_of(url: str, connections: int) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
    return httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S, limits=limits, trust_env=False)


async def ask_until(
    stopped: asyncio.Event,
    url: str,
    keys: Sequence[str],
    seen: Seen,
    workers: int,
    seed: int,
    body_of: Callable[[random.Random], dict[str, object]] = any_chat,
) -> None:
    """Keep that many clients busy until ``stopped`` is set."""

    async def work(number: int) -> None:
        chance = random.Random(f"{seed}:{number}")
        while not stopped.is_set():
            if not await ask(client, chance.choice(keys), body_of(chance), seen):
                await asyncio.sleep(PAUSE_S)

    async with client_of(url, workers) as client:
        await asyncio.gather(*(work(number) for number in range(workers)))
