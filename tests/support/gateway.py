"""A gateway without HTTP server, spoken to over ASGI, and what tests say to it."""

import asyncio
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import httpx
from deployments.gateway.services import Services
from redis.asyncio import Redis
from starlette.types import ASGIApp

from billing.ledger.account import Grant
from billing.money import Nanos, parse_usd
from billing.tenants.tenant import Tenant, new_key
from billing.usage import TenantId, Unit
from tests.support.scripted import ScriptedLink

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


@dataclass
class House:
    """One gateway and the client that speaks to it."""

    services: Services
    link: ScriptedLink
    app: ASGIApp
    client: httpx.AsyncClient
    redis: Redis

    async def tenant(
        self, name: str = "acme", usd: str = "1.00", plan: str = "prepaid", models: tuple[str, ...] | None = None
    ) -> str:
        """A tenant with that much credit; returns its API key."""
        await self.services.tenants.create(Tenant(id=TenantId(name), email=f"{name}@example.com", plan=plan))
        if nanos := parse_usd(usd):
            await self.services.ledger.grant(Grant(f"test:{name}", TenantId(name), Unit.NANOS, nanos))
        secret, key = new_key(TenantId(name), 0, models=models)
        await self.services.tenants.add_key(key)
        return secret

    async def balance(self, name: str = "acme") -> Nanos:
        return (await self.services.ledger.account(TenantId(name))).balance_nanos

    async def open_holds(self, name: str = "acme") -> int:
        return (await self.services.ledger.account(TenantId(name))).open_holds

    async def post(self, key: str, path: str = "/v1/chat/completions", **body: object) -> httpx.Response:
        return await self.client.post(path, json=body, headers=bearer(key))

    async def chat(self, key: str, text: str = "one two three", **body: object) -> httpx.Response:
        asked = {"model": "pirate", "messages": [{"role": "user", "content": text}], "max_tokens": 10} | body
        return await self.post(key, **asked)

    async def settled(self) -> None:
        """Wait for what outlives connections."""
        while self.services.gateway.settler.tasks:
            await asyncio.wait(set(self.services.gateway.settler.tasks))


async def until(condition: Callable[[], bool]) -> None:
    """Look again every few milliseconds; the test's own timeout is the bound."""
    while not condition():  # noqa: ASYNC110, nothing there sets an event
        await asyncio.sleep(0.005)


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def events(reply: httpx.Response) -> list[dict[str, object]]:
    """The JSON of a stream's data lines, without ``[DONE]``."""
    lines = [line.removeprefix("data: ") for line in reply.text.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def memory_folder(prefix: str) -> Path:
    """A folder in memory where there is one: a disk that others keep busy must not make a law about time fail."""
    shared = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix=prefix, dir=shared if shared.is_dir() else None))


MakeServices = Callable[..., Services]
