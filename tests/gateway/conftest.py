"""A gateway on a real store with a link of clockwork, spoken to over ASGI."""

import asyncio
import json
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import httpx
import pytest
from redis.asyncio import Redis
from starlette.types import ASGIApp
from tokenizers import Tokenizer, models, pre_tokenizers

from billing.account import Grant
from billing.money import Nanos, parse_usd
from billing.store.connection import connect
from billing.tenants import Tenant, new_key
from billing.usage import TenantId, Unit
from cluster import valkey
from deployments.api.application import make_app
from deployments.config import FareboxArgs
from deployments.engine.text import Text
from deployments.services import Services
from deployments.shelf import Shelf
from deployments.wiring import build_services
from tests.gateway.scripted import ScriptedLink

ADMIN_KEY = "admin-key-of-the-tests"
CHAT_TEMPLATE = "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}<assistant>"
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
        "payg": {"kind": "pay_as_you_go", "overage_cap": "5.00", "weight": 3},
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


@pytest.fixture(scope="session")
def store_url() -> Iterator[str]:
    """The address of a real Valkey that logs every write, as in production, but in memory."""
    folder = memory_folder("v")
    server = valkey.start(folder)
    yield server.url
    server.stop()
    shutil.rmtree(folder)


@pytest.fixture
async def redis(store_url: str) -> AsyncIterator[Redis]:
    """A client as a gateway has it, of an empty store."""
    client = await connect(store_url)
    await client.flushall()
    yield client
    await client.aclose()


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Text:
    """A tokenizer of whole words: every word, known or not, is one token."""
    folder = tmp_path_factory.mktemp("model")
    words = ["<unk>", "<end>", "<user>", "<system>", "<assistant>", "one", "two", "three"]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>", "chat_template": CHAT_TEMPLATE}))
    return Text(folder)


@pytest.fixture
def link() -> ScriptedLink:
    return ScriptedLink()


@pytest.fixture
def args(tmp_path: Path) -> FareboxArgs:
    return FareboxArgs.model_validate(
        {
            "model": {"id": "farebox-base", "path": "unused"},
            "engine": {"max_context_tokens": 64},
            "spool_dir": str(tmp_path / "spool"),
            "checkpoint_s": 0.05,
            "max_body_kib": 16,
        }
    )


MakeServices = Callable[..., Services]


@pytest.fixture
def make_services(text: Text, args: FareboxArgs) -> MakeServices:
    def make(redis: Redis, link: ScriptedLink, environ: Mapping[str, str] = MappingProxyType({})) -> Services:
        shelf = Shelf()
        shelf.put(USER_CONFIG)
        return build_services(args, text, redis, link, shelf, {"FAREBOX_ADMIN_KEY": ADMIN_KEY, **environ}, "gw_test")

    return make


@pytest.fixture
async def house(redis: Redis, link: ScriptedLink, make_services: MakeServices) -> AsyncIterator[House]:
    services = make_services(redis, link)
    app = make_app(services)
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://farebox") as client:
        services.gateway.start()
        yield House(services, link, app, client, redis)
        await services.gateway.stop()
