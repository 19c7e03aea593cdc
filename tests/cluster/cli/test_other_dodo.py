"""Commands on a running farebox use the Dodo that it was started with, and refuse a shell that names another one."""

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import Result
from redis import Redis
from typer.testing import CliRunner

from billing.catalog.catalog import Catalog
from billing.dodo.errors import DodoMisconfigured
from billing.store.keys import DODO_IDS, META
from cluster import valkey
from cluster.cli.main import app
from cluster.dodo_sandbox.server import SandboxServer
from cluster.local import configuration, dodo_products, supervisor
from cluster.local.settings import Settings
from cluster.local.state import Home, Phase
from cluster.local.supervisor import supervise
from tests.support.cli import write_healthy_run
from tests.support.configuration import Workspace
from tests.support.waiting import free_port
from tests.support.world import CATALOG

VARIABLES = ("FAREBOX_DODO_ENVIRONMENT", "DODO_PAYMENTS_API_KEY", "DODO_PAYMENTS_BASE_URL", "FAREBOX_PUBLIC_URL")
KEY, OTHER_KEY = "dodo_test_0123456789_abcd", "dodo_test_0123456789_wxyz"
COMMANDS = (["deploy", "serve_config.yaml"], ["dodo", "sync", "--plan"], ["reconcile"], ["usage"], ["tenants", "list"])


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Gives this process exactly these of Dodo's variables."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FAREBOX_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("REDIS_URL", raising=False)

    def has(**variables: str) -> None:
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    has()
    return has


@pytest.fixture
def dodo(store_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a sandbox that stands in for Dodo's test mode."""
    monkeypatch.setattr(configuration, "checked", lambda settings: {"applications": []})
    monkeypatch.setattr(dodo_products, "catalog_of", lambda config: Catalog.model_validate(CATALOG))
    client = Redis.from_url(store_url)
    client.flushall()
    client.close()
    with SandboxServer(tmp_path / "dodo", KEY) as server:
        yield server.url


def farebox(*words: str) -> Result:
    return CliRunner().invoke(app, list(words))


def start(store_url: str, shell: Callable[..., None], **variables: str) -> None:
    """A running farebox that was started by a shell with these variables; then the shell is plain again."""
    shell(**variables)
    write_healthy_run(store_url)
    shell()


def test_plain_shell_works_after_a_start_in_test_mode(store_url: str, dodo: str, shell: Callable[..., None]) -> None:
    test_mode = {
        "FAREBOX_DODO_ENVIRONMENT": "test_mode",
        "DODO_PAYMENTS_API_KEY": KEY,
        "DODO_PAYMENTS_BASE_URL": dodo,
        "FAREBOX_PUBLIC_URL": "https://api.example.com",
    }
    start(store_url, shell, **test_mode)
    synced = farebox("dodo", "sync")
    assert "created at Dodo: meter:charge, pack:small" in synced.output, synced.output
    assert "DODO_PAYMENTS_WEBHOOK_KEY" in synced.output, "it is told of the webhook, as it is not in the sandbox"
    assert farebox("reconcile").exit_code == 0
    client = Redis.from_url(store_url, decode_responses=True)
    assert client.hget(META, "dodo") == "test_mode"
    client.close()
    shell(**test_mode)
    assert farebox("reconcile").exit_code == 0, "the same Dodo by name is not refused"
    file = Home(Settings.from_env().home).operator
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


SANDBOX: dict[str, str] = {}
TEST = {"FAREBOX_DODO_ENVIRONMENT": "test_mode", "DODO_PAYMENTS_API_KEY": KEY}
LIVE = {"FAREBOX_DODO_ENVIRONMENT": "live_mode", "DODO_PAYMENTS_API_KEY": "dodo_live_0123456789_abcd"}


@pytest.mark.parametrize(
    ("started", "now", "named"),
    [
        (SANDBOX, TEST, ("FAREBOX_DODO_ENVIRONMENT=sandbox", "FAREBOX_DODO_ENVIRONMENT=test_mode")),
        (SANDBOX, LIVE, ("=sandbox", "=live_mode")),
        (TEST, {"FAREBOX_DODO_ENVIRONMENT": "sandbox"}, ("=test_mode", "=sandbox")),
        (TEST, LIVE, ("=test_mode", "=live_mode", "DODO_PAYMENTS_API_KEY")),
        (LIVE, TEST, ("=live_mode", "=test_mode")),
        (TEST, {"DODO_PAYMENTS_API_KEY": OTHER_KEY}, ("…abcd", "…wxyz", "unset DODO_PAYMENTS_API_KEY")),
        (TEST, {"DODO_PAYMENTS_BASE_URL": "http://127.0.0.1:1"}, ("(unset)", "http://127.0.0.1:1")),
        (SANDBOX, {"DODO_PAYMENTS_BASE_URL": "http://127.0.0.1:1"}, ("http://127.0.0.1:9,", "http://127.0.0.1:1:")),
        (TEST | {"DODO_PAYMENTS_BASE_URL": "http://127.0.0.1:2"}, {"DODO_PAYMENTS_BASE_URL": "http://127.0.0.1:1"},
         ("http://127.0.0.1:2", "http://127.0.0.1:1")),
        (SANDBOX, {"FAREBOX_DODO_ENVIRONMENT": "production"}, ("=sandbox", "=production")),
    ],
)  # fmt: skip
def test_shell_of_another_dodo_is_refused(
    store_url: str, shell: Callable[..., None], started: dict[str, str], now: dict[str, str], named: tuple[str, ...]
) -> None:
    start(store_url, shell, **started)
    shell(**now)
    for words in COMMANDS:
        done = farebox(*words)
        assert done.exit_code == 1, words
        assert [name for name in named if name not in done.stderr] == [], done.stderr
        assert "unset" in done.stderr
        assert "farebox down" in done.stderr
        assert KEY not in done.stderr
    assert "was started with" not in farebox("status").output, "a farebox can be looked at from any shell"


def test_check_says_what_it_did_not_look_up(
    store_url: str, shell: Callable[..., None], tmp_path: Path, repo: Path
) -> None:
    start(store_url, shell)
    shell(**TEST)
    workspace = Workspace(tmp_path, (repo / "serve_config.yaml").read_text())
    done = farebox("check", str(workspace.file))
    assert done.exit_code == 0, done.output
    assert "only the file was checked" in done.output
    assert "FAREBOX_DODO_ENVIRONMENT=test_mode" in done.output


def test_shell_of_another_store_is_refused(
    store_url: str, shell: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    start(store_url, shell)
    monkeypatch.setenv("REDIS_URL", "redis://:secret@127.0.0.1:1")
    for words in COMMANDS:
        done = farebox(*words)
        assert done.exit_code == 1, words
        assert f"REDIS_URL={store_url}" in done.stderr
        assert "REDIS_URL=redis://:***@127.0.0.1:1" in done.stderr
        assert "unset REDIS_URL" in done.stderr
        assert "secret" not in done.stderr
    monkeypatch.setenv("REDIS_URL", store_url)
    assert farebox("usage").exit_code == 0, "the same store by name is not refused"


@pytest.mark.parametrize(
    ("started", "now"),
    [
        (SANDBOX, {"DODO_PAYMENTS_API_KEY": "dodo_live_0123456789"}),
        (SANDBOX, {"FAREBOX_DODO_ENVIRONMENT": "sandbox", "DODO_PAYMENTS_BASE_URL": "http://127.0.0.1:9/"}),
        (TEST, {"FAREBOX_DODO_ENVIRONMENT": "test_mode"}),
        (TEST, TEST),
        (LIVE, SANDBOX),
    ],
)
def test_shell_of_the_same_dodo_is_not_refused(
    store_url: str, shell: Callable[..., None], started: dict[str, str], now: dict[str, str]
) -> None:
    start(store_url, shell, **started)
    shell(**now)
    assert farebox("usage").exit_code == 0, "a key alone names no Dodo where the sandbox was started"


@pytest.mark.parametrize("now", [TEST, LIVE])
def test_cluster_commands_refuse_a_store_of_another_environment(
    store_url: str, dodo: str, shell: Callable[..., None], now: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    public = {"REDIS_URL": store_url, "FAREBOX_PUBLIC_URL": "https://api.example.com"}
    shell(**public, FAREBOX_DODO_ENVIRONMENT="sandbox", DODO_PAYMENTS_API_KEY=KEY, DODO_PAYMENTS_BASE_URL=dodo)
    assert farebox("dodo", "sync").exit_code == 0
    shell(**public, **now)
    for words in (["dodo", "sync", "--plan"], ["dodo", "sync", "--yes"], ["reconcile"]):
        assert "belongs to Dodo's sandbox" in farebox(*words).stderr
    monkeypatch.delenv("REDIS_URL")


@pytest.mark.parametrize(
    ("owner", "now"), [("sandbox", TEST), ("sandbox", LIVE), ("test_mode", LIVE), ("live_mode", SANDBOX)]
)
def test_up_refuses_a_store_of_another_environment(
    shell: Callable[..., None], tmp_path: Path, owner: str, now: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "begin_check", lambda *_: None)
    config = tmp_path / "serve_config.yaml"
    config.write_text("applications: []\n")
    ports = {name: free_port() for name in ("port", "dashboard_port", "sandbox_port")}
    settings = Settings(home=tmp_path / "home", config=config, **ports)  # type: ignore[arg-type]
    home = Home.open(settings)
    store = valkey.start(home.store)
    client = Redis.from_url(store.url)
    client.hset(META, mapping={"dodo": owner, "schema": "2", "shards": "64"})
    client.hset(DODO_IDS, "pack:small", "pdt_1")
    client.close()
    store.stop()
    shell(**now)
    steps: list[str] = []
    with pytest.raises(DodoMisconfigured, match=f"belongs to Dodo's {owner}.*another folder in FAREBOX_HOME"):
        supervise(settings, steps.append, lambda: None)
    run = home.read_run()
    assert run is not None
    assert (run.phase, run.pid) == (Phase.FAILED, os.getpid())
    assert "starting Ray" not in steps
    assert not home.operator.exists(), "the key is kept only while it runs"
