"""A gateway on a real store with a scripted link, and engines on a tiny random model and its adapters."""

import shutil
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from redis.asyncio import Redis
from tokenizers import Tokenizer

from billing.store.connection import connect
from cluster import valkey
from deployments.config import FareboxArgs
from deployments.gateway.catalog_holder import CatalogHolder
from deployments.gateway.gateway import Gateway
from deployments.gateway.parts import GatewayConfig, build_parts
from deployments.inference.adapters import digest_adapter
from deployments.inference.native.engine import Engine
from deployments.inference.native.settings import EngineSettings
from deployments.inference.request import AdapterRef
from deployments.inference.text import Text
from deployments.token_stream.link import ReplicaLink
from tests.support.gateway import (
    ADMIN_KEY,
    USER_CONFIG,
    Harness,
    IsolatedGateway,
    MakeGateway,
    memory_folder,
    running,
)
from tests.support.models import Oracle, make_adapters, make_base, make_oracle, make_tokenizer, small_settings
from tests.support.scripted import ScriptedLink
from tests.support.word_tokenizer import save_word_tokenizer


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
def make_gateway(text: Text, args: FareboxArgs) -> MakeGateway:
    def make(redis: Redis, link: ReplicaLink, environ: Mapping[str, str] = MappingProxyType({})) -> Gateway:
        catalog_holder = CatalogHolder()
        catalog_holder.put(USER_CONFIG)
        environ = {"FAREBOX_ADMIN_KEY": ADMIN_KEY, **environ}
        parts = build_parts(args, environ, redis=redis, text=text, link=link, catalog_holder=catalog_holder)
        return Gateway(GatewayConfig.of(args, environ, "gw_test"), parts)

    return make


@pytest.fixture
async def harness(redis: Redis, link: ScriptedLink, make_gateway: MakeGateway) -> AsyncIterator[Harness]:
    async with running(make_gateway(redis, link), link) as made:
        yield made


@pytest.fixture
async def isolated(link: ScriptedLink, make_gateway: MakeGateway) -> AsyncIterator[IsolatedGateway]:
    folder = memory_folder("w")
    server = valkey.start(folder)
    redis = await connect(server.url)
    async with running(make_gateway(redis, link), link) as harness:
        made = IsolatedGateway(server, harness)
        yield made
        made.resume()
    await redis.aclose()
    server.stop()
    shutil.rmtree(folder)


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
    """Starts engines, and stops them at the end."""
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
