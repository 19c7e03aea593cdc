"""A gateway with a real store and a scripted engine, and engines with a small random model and its adapters."""

import shutil
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import httpx
import pytest
import torch
from deployments.gateway.services import Services
from deployments.gateway.wiring import build_services
from redis.asyncio import Redis
from tokenizers import Tokenizer

from billing.store.connection import connect
from cluster import valkey
from deployments.config import FareboxArgs
from deployments.gateway.api.application import make_app
from deployments.gateway.catalog_holder import CatalogHolder
from deployments.inference.adapters import digest_adapter
from deployments.inference.native.engine import Engine
from deployments.inference.native.settings import EngineSettings
from deployments.inference.request import AdapterRef
from deployments.inference.text import Text
from tests.support.gateway import ADMIN_KEY, USER_CONFIG, House, MakeServices, memory_folder
from tests.support.models import Oracle, make_adapters, make_base, make_oracle, make_tokenizer, small_settings
from tests.support.scripted import ScriptedLink
from tests.support.word_tokenizer import save_word_tokenizer


@pytest.fixture(scope="session")
def store_url() -> Iterator[str]:
    """The address of a real Valkey that syncs its log at every write, as in production, to a folder in memory."""
    folder = memory_folder("v")
    server = valkey.start(folder)
    yield server.url
    server.stop()
    shutil.rmtree(folder)


@pytest.fixture
async def redis(store_url: str) -> AsyncIterator[Redis]:
    """A client of an empty store, made as a gateway makes it."""
    client = await connect(store_url)
    await client.flushall()
    yield client
    await client.aclose()


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Text:
    """A tokenizer for which every word, known or not, is one token."""
    folder = tmp_path_factory.mktemp("model")
    save_word_tokenizer(folder, ("one", "two", "three"))
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


@pytest.fixture
def make_services(text: Text, args: FareboxArgs) -> MakeServices:
    def make(redis: Redis, link: ScriptedLink, environ: Mapping[str, str] = MappingProxyType({})) -> Services:
        catalog_holder = CatalogHolder()
        catalog_holder.put(USER_CONFIG)
        return build_services(
            args, text, redis, link, catalog_holder, {"FAREBOX_ADMIN_KEY": ADMIN_KEY, **environ}, "gw_test"
        )

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


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return make_tokenizer()


@pytest.fixture(scope="session")
def base_path(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    return make_base(tmp_path_factory.mktemp("models") / "base", tokenizer)


@pytest.fixture(scope="session")
def adapter_paths(tmp_path_factory: pytest.TempPathFactory, base_path: Path) -> dict[str, Path]:
    return make_adapters(tmp_path_factory.mktemp("adapters"), base_path)


@pytest.fixture(scope="session")
def refs(adapter_paths: dict[str, Path]) -> dict[str, AdapterRef]:
    return {name: AdapterRef(name, digest_adapter(path), str(path)) for name, path in adapter_paths.items()}


@pytest.fixture(scope="session")
def oracle(base_path: Path, adapter_paths: dict[str, Path]) -> Oracle:
    return make_oracle(base_path, adapter_paths)


@pytest.fixture(scope="session")
def settings(base_path: Path) -> EngineSettings:
    return small_settings(base_path)


@pytest.fixture
def start() -> Iterator[Callable[[EngineSettings], Engine]]:
    """Start engines with it; all are stopped at the end of the test."""
    engines: list[Engine] = []

    def start_engine(settings: EngineSettings) -> Engine:
        engine = Engine(settings)
        engines.append(engine)
        engine.start()
        return engine

    yield start_engine
    for engine in engines:
        engine.stop()


@pytest.fixture
def engine(start: Callable[[EngineSettings], Engine], settings: EngineSettings) -> Engine:
    return start(settings)
