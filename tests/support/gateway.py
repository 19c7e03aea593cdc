"""A gateway without an HTTP server: made, called over ASGI, and looked at."""

import asyncio
import json
import os
import signal
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
from redis.asyncio import Redis
from starlette.types import ASGIApp

from billing.ledger.account import Grant
from billing.money import Nanos, parse_usd
from billing.store import guard
from billing.store.keys import shard_for
from billing.tenants.tenant import BUYER_SCOPES, Scope, Tenant, new_key
from billing.usage import TenantId, Unit, UsageRecord
from cluster import valkey
from deployments.gateway.api.application import make_app
from deployments.gateway.gateway import Gateway
from deployments.token_stream.link import ReplicaLink
from tests.support.scripted import ScriptedLink
from tests.support.waiting import until

PROMPT_NANOS = parse_usd("0.005")
"""What the prompt of ``Harness.chat`` costs on ``pirate``, and each of its tokens."""
TOKEN_NANOS = parse_usd("0.002")
HUNG_TIMEOUT_S = 0.25
ADMIN_KEY = "admin-key-of-the-tests"
DIGEST = "ab" * 32
USER_CONFIG: dict[str, object] = {
    "base": {"id": "farebox-base", "price": {"input_per_1m": "1", "output_per_1m": "2"}},
    "adapters": [
        {
            "id": "pirate",
            "path": "/adapters/pirate",
            "digest": DIGEST,
            "price": {"input_per_1m": "1000", "cached_input_per_1m": "100", "output_per_1m": "2000"},
        },
        {
            "id": "acme/private:1",
            "path": "/adapters/private",
            "digest": DIGEST,
            "price": {"per_request": "0.01"},
            "visibility": ["acme"],
        },
        {
            "id": "metered",
            "path": "/adapters/metered",
            "digest": DIGEST,
            "price": {"per_compute_second": "0.01"},
            "visibility": ["acme"],
        },
        {"id": "gratis", "path": "/adapters/gratis", "digest": DIGEST, "price": {"free": True}},
        {"id": "unpriced", "path": "/adapters/unpriced", "digest": DIGEST},
    ],
    "plans": {
        "free": {"kind": "free", "allowance": {"usd": "1.00"}, "limits": {"requests_per_minute": 3}},
        "prepaid": {"kind": "prepaid"},
        "payg": {"kind": "pay_as_you_go", "credit_limit": "5.00", "weight": 3},
    },
    "packs": {"small": {"price": "5.00", "grants": {"usd": "5.00"}}},
    "default_plan": "prepaid",
}

Receive = Callable[[], Awaitable[dict[str, object]]]
Send = Callable[[dict[str, object]], Awaitable[None]]
MakeGateway = Callable[..., Gateway]


@dataclass
class Harness:
    """One gateway and the client that calls it."""

    gateway: Gateway
    link: ScriptedLink
    app: ASGIApp
    client: httpx.AsyncClient
    redis: Redis

    async def tenant(
        self,
        name: str = "acme",
        usd: str = "1.00",
        plan: str = "prepaid",
        models: tuple[str, ...] | None = None,
        scopes: tuple[Scope, ...] = BUYER_SCOPES,
    ) -> str:
        """A tenant with that much credit; returns its API key, which may buy as well."""
        parts = self.gateway.parts
        await parts.tenants.create(Tenant(id=TenantId(name), email=f"{name}@example.com", plan=plan))
        if nanos := parse_usd(usd):
            await parts.ledger.grant(Grant(f"test:{name}", TenantId(name), Unit.NANOS, nanos))
        secret, key = new_key(TenantId(name), 0, models=models, scopes=scopes)
        await parts.tenants.add_key(key)
        return secret

    async def balance(self, name: str = "acme") -> Nanos:
        return (await self.gateway.parts.ledger.account(TenantId(name))).balance_nanos

    async def open_holds(self, name: str = "acme") -> int:
        return (await self.gateway.parts.ledger.account(TenantId(name))).open_holds

    async def records(self, name: str = "acme") -> list[UsageRecord]:
        """The tenant's usage records, oldest first."""
        entries = await self.redis.xrange(shard_for(TenantId(name)).stream)
        return [UsageRecord.from_json(fields["p"]) for _, fields in entries if fields["k"] == "usage"]

    async def post(self, key: str, path: str = "/v1/chat/completions", **body: object) -> httpx.Response:
        return await self.client.post(path, json=body, headers=bearer(key))

    async def chat(self, key: str, text: str = "one two three", **body: object) -> httpx.Response:
        return await self.post(key, **chat_body(text, **body))

    async def settled(self) -> None:
        """Wait for what outlives connections."""
        settler = self.gateway.parts.settler
        while settler.tasks:
            await asyncio.wait(set(settler.tasks))

    async def disconnect(self, key: str, after_chunks: int, stream: bool = True) -> None:
        """Chat, and disconnect after so many chunks; with 0, cancel the call as a server does, once the engine runs."""
        gone = asyncio.Event()
        seen = 0

        async def receive_rest() -> dict[str, object]:
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, object]) -> None:
            nonlocal seen
            seen += message["type"] == "http.response.body" and b"tok" in message["body"]  # type: ignore[operator]
            if seen >= after_chunks > 0:
                gone.set()

        task = asyncio.create_task(self.call(key, chat_body(stream=stream), receive_rest, send))
        if after_chunks == 0:
            await until(lambda: self.link.steps)
            task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await self.settled()

    async def call(self, key: str, body: dict[str, object], receive_rest: Receive, send: Send) -> None:
        """Chat over ASGI. ``receive_rest`` is awaited for what the client sends after its request."""
        sent: list[bool] = []

        async def receive() -> dict[str, object]:
            if sent:
                return await receive_rest()
            sent.append(True)
            return {"type": "http.request", "body": json.dumps(body).encode()}

        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "method": "POST",
            "path": "/v1/chat/completions",
            "raw_path": b"/v1/chat/completions",
            "query_string": b"",
            "headers": [(b"authorization", f"Bearer {key}".encode()), (b"content-type", b"application/json")],
        }
        await self.app(scope, receive, send)  # type: ignore[arg-type]

    async def checkpoint_and_die(self) -> None:
        """Renew leases once, then do nothing any more: as a gateway that is killed right after a checkpoint."""
        await self.gateway.leases.renew_once()
        for task in self.gateway.tasks:
            task.cancel()
        await asyncio.gather(*self.gateway.tasks, return_exceptions=True)


@asynccontextmanager
async def running(gateway: Gateway, link: ReplicaLink) -> AsyncIterator[Harness]:
    """Start a gateway, and stop it at the end."""
    app = make_app(gateway)
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://farebox") as client:
        gateway.start()
        yield Harness(gateway, link, app, client, gateway.parts.redis)  # type: ignore[arg-type]
        await gateway.stop()


@dataclass
class IsolatedGateway:
    """A gateway on a store of its own, which a test may hang or end."""

    server: valkey.Valkey
    harness: Harness
    timeout_s: float = 0.0
    """How long calls to the store wait while it is not hung."""

    def hang(self) -> None:
        """Stop the store's process; calls to it time out soon."""
        os.kill(self.server.pid, signal.SIGSTOP)
        self.timeout_s, guard.SILENCE_S = guard.SILENCE_S, HUNG_TIMEOUT_S

    def resume(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.server.pid, signal.SIGCONT)
        guard.SILENCE_S = self.timeout_s or guard.SILENCE_S


def chat_body(text: str = "one two three", **more: object) -> dict[str, object]:
    return {"model": "pirate", "messages": [{"role": "user", "content": text}], "max_tokens": 10} | more


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def events(reply: httpx.Response) -> list[dict[str, object]]:
    """The JSON of a stream's data lines, without ``[DONE]``."""
    lines = [line.removeprefix("data: ") for line in reply.text.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def assert_problem(reply: httpx.Response, status: int, code: str) -> dict[str, object]:
    """Check that the reply is an error in the one shape, with this status and code; returns its body."""
    assert reply.status_code == status, reply.text
    body: dict[str, object] = reply.json()
    assert reply.headers["content-type"] == "application/problem+json"
    assert reply.headers["x-request-id"].startswith("req_")
    assert body["type"] == f"urn:farebox:problem:{code.replace('_', '-')}"
    assert body["status"] == status
    assert isinstance(body["detail"], str)
    error = body["error"]
    assert isinstance(error, dict)
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code
    assert error["message"]
    return body


def memory_folder(prefix: str) -> Path:
    """A folder in memory where there is one, so that a busy disk does not make tests of timeouts fail."""
    shared = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix=prefix, dir=shared if shared.is_dir() else None))
