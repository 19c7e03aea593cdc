"""The parts around a scenario: a real store, the offline Dodo, a tokenizer, and processes that can be killed.

Knows how to start and end them; what is proved of them stands in ``proof``.
"""

import asyncio
import json
import multiprocessing
import signal
import socket
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import httpx
from tokenizers import Tokenizer, models, pre_tokenizers

from billing.catalog import publication
from billing.clock import Clock, now_ms
from billing.commerce.sync import sync
from billing.dodo.client import Dodo
from billing.dodo.settings import DodoSettings
from billing.ledger.account import Grant
from billing.store.connection import connect
from billing.tenants.tenant import new_key
from billing.usage import TenantId, Unit
from cluster import valkey
from cluster.dodo_sandbox.server import SandboxServer, listen
from deployments.gateway.catalog_holder import read_catalog
from tests.support.world import API_KEY, SECRET, World

USER_CONFIG: dict[str, object] = {
    "base": {"id": "farebox-base", "price": {"input_per_1m": "1", "output_per_1m": "2"}},
    "adapters": [
        {
            "id": "pirate",
            "path": "/adapters/pirate",
            "digest": "ab" * 32,
            "price": {"input_per_1m": "333.333333", "output_per_1m": "1777.777777"},
        },
        {"id": "flat", "path": "/adapters/flat", "digest": "cd" * 32, "price": {"per_request": "0.01"}},
    ],
    "plans": {"prepaid": {"kind": "prepaid"}},
    "packs": {"small": {"price": "5.00", "grants": {"usd": "5.00"}}},
    "default_plan": "prepaid",
}
"""Prices that do not divide evenly, so that a rounding too many would show."""
CHAT_TEMPLATE = "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}<assistant>"
LIFE_S = 60.0
"""A process that was to kill itself and lives longer was never brought to its point."""


@dataclass(frozen=True)
class House:
    """A store and an offline Dodo in a folder of their own."""

    folder: Path
    store_url: str
    dodo_url: str

    @property
    def environ(self) -> dict[str, str]:
        """What a process of Farebox is given."""
        return {
            "REDIS_URL": self.store_url,
            "FAREBOX_DODO_ENVIRONMENT": "sandbox",
            "DODO_PAYMENTS_BASE_URL": self.dodo_url,
            "DODO_PAYMENTS_API_KEY": API_KEY,
            "DODO_PAYMENTS_WEBHOOK_KEY": SECRET,
        }

    @property
    def model(self) -> Path:
        return self.folder / "model"


@contextmanager
def house(clock: Clock = now_ms) -> Iterator[House]:
    """Call from the main thread: the store ends with the thread that started it."""
    with tempfile.TemporaryDirectory(prefix="chaos") as name:
        folder = Path(name)
        _make_tokenizer(folder / "model")
        server = valkey.start(folder / "v")
        try:
            with SandboxServer(folder / "dodo", API_KEY, webhook_secret=SECRET, clock=clock) as sandbox:
                yield House(folder, server.url, sandbox.url)
        finally:
            server.stop()


@asynccontextmanager
async def world(
    house: House, clock: Clock = now_ms, http_client: httpx.AsyncClient | None = None
) -> AsyncIterator[World]:
    """Everything for sale is made at Dodo; nobody is there yet. ``http_client`` sees every call to Dodo."""
    redis = await connect(house.store_url)
    dodo = Dodo(DodoSettings(API_KEY, SECRET, base_url=house.dodo_url), http_client)
    catalog = read_catalog(USER_CONFIG)
    async with httpx.AsyncClient(base_url=house.dodo_url, trust_env=False, timeout=30) as operator:
        await publication.publish(redis, catalog, "gateway-1", clock())
        await sync(dodo, redis, catalog)
        yield World(redis, dodo, operator, clock, catalog)  # type: ignore[arg-type]
    await dodo.close()
    await redis.aclose()


async def tenant_with(world: World, name: str, nanos: int) -> str:
    """A tenant with a customer at Dodo and that much credit; its API key."""
    tenant = await world.tenant(name)
    if nanos:
        await world.ledger.grant(Grant(f"chaos:{name}", tenant.id, Unit.NANOS, nanos))
    secret, key = new_key(TenantId(name), now_ms())
    await world.tenants.add_key(key)
    return secret


@contextmanager
def listener() -> Iterator[socket.socket]:
    """A port that stays open while the processes that answer on it die: clients wait, none is refused."""
    bound = listen("127.0.0.1", 0)
    bound.listen(4096)
    try:
        yield bound
    finally:
        bound.close()


class Forks:
    """Starts processes quickly: each is forked from one that has imported everything and started nothing."""

    def __init__(self, module: str) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([module])

    def start(self, target: Callable[..., None], *args: object) -> BaseProcess:
        process = self._context.Process(target=target, args=args, daemon=True)
        process.start()
        return process

    async def live(self, target: Callable[..., None], *args: object) -> None:
        """One life, ended by its own SIGKILL. Raises AssertionError where it ends otherwise, TimeoutError where not."""
        process = self.start(target, *args)
        try:
            async with asyncio.timeout(LIFE_S):
                while process.exitcode is None:  # noqa: ASYNC110, looked at from this thread only: two may steal the code
                    await asyncio.sleep(0.02)
            assert process.exitcode == -signal.SIGKILL, f"{target.__name__} ended with {process.exitcode}"
        finally:
            process.kill()


def _make_tokenizer(folder: Path) -> None:
    """Every word, known or not, is one token."""
    folder.mkdir()
    words = ["<unk>", "<end>", "<user>", "<system>", "<assistant>"]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>", "chat_template": CHAT_TEMPLATE}))
