"""Real stores of several servers, on loopback: a cluster, a primary that sentinels watch; and waits for their calls.

Start them from the main thread: the kernel ends them with the thread that started them.
"""

import asyncio
import os
import signal
import socket
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import SystemRandom

import redis

from billing.ledger.ledger import Ledger
from billing.store.errors import StoreUnavailable
from billing.usage import TenantId
from cluster import valkey

HOST = "127.0.0.1"
PATIENCE_S = 20.0
BUS = 10_000
"""Nodes of a cluster connect to each other at their port plus this."""
SLOTS = 16_384
SERVICE = "ledger"
PROMPT_S = 2.5
"""A call of a silent store fails within 0.3 s, and later on a busy machine; one that is not bounded waits for 5 s."""


@dataclass
class Server:
    """One server process, which can be started again on its data."""

    port: int
    folder: Path
    command: Sequence[str]
    env: Mapping[str, str] | None = None
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> "Server":
        self.folder.mkdir(exist_ok=True, parents=True)
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                self.command, cwd=self.folder, env=self.env, stdout=log, stderr=log, preexec_fn=valkey.die_with_parent()
            )
        return self

    def send(self, number: signal.Signals) -> None:
        assert self.process is not None, "it was started"
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    @property
    def client(self) -> "redis.Redis":
        return redis.Redis(host=HOST, port=self.port, decode_responses=True)

    def await_answer(self) -> "Server":
        def answers() -> bool:
            with self.client as client:
                return bool(client.ping())

        wait_until(answers, f"the server of {self.folder}")
        return self


@dataclass
class Fleet:
    url: str
    servers: list[Server]
    sentinels: list[Server] = field(default_factory=list)

    def kill(self) -> None:
        for server in (*self.sentinels, *self.servers):
            server.kill()


def replace_primary(fleet: Fleet) -> None:
    """Kill the primary, wait until the sentinels promote the replica, and start the old one again as its replica.

    The sentinels may promote the old one once more: whichever is the primary then comes first in ``fleet.servers``.
    """
    old, new = fleet.servers
    old.kill()
    wait_until(lambda: new.client.info()["role"] == "master", "a promoted replica")
    come_back(old, new)
    wait_until(lambda: in_step(old, new) or in_step(new, old), "a replica in step")
    fleet.servers = [new, old] if in_step(old, new) else [old, new]


def follow(old: Server, new: Server) -> None:
    """Start a server again as the replica of another one, and wait until it has all data."""
    come_back(old, new)
    wait_until(lambda: in_step(old, new), "a replica in step")


def come_back(old: Server, new: Server) -> None:
    """Start a server again as the replica of another one."""
    words = list(old.command)
    if "--replicaof" in words:
        at = words.index("--replicaof")
        del words[at : at + 3]
    old.command = [*words, "--replicaof", HOST, str(new.port)]
    old.start().await_answer()


def in_step(replica: Server, primary: Server) -> bool:
    """Is it a replica of that primary, with all its data?"""
    state = replica.client.info("replication")
    is_linked = state.get("master_link_status") == "up" and state["master_port"] == primary.port
    return is_linked and primary.client.info("replication")["role"] == "master"


def wait_until(is_so: Callable[[], bool], what: str, patience_s: float = PATIENCE_S) -> None:
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        try:
            if is_so():
                return
        except redis.exceptions.RedisError:
            pass
        time.sleep(0.02)
    raise AssertionError(f"{what} did not come about within {patience_s:g} s")


def free_port() -> int:
    """Return a port whose bus port is free too, below those that the kernel gives to clients."""
    while True:
        port = SystemRandom().randrange(12_000, 20_000)
        if all(_is_free(number) for number in (port, port + BUS)):
            return port


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
        return True


def durable(folder: Path, program: Path | None = None, **options: str) -> Server:
    """Return a server on a port, with the durability of production, that is not started yet."""
    port = free_port()
    words = {
        "port": str(port),
        "bind": HOST,
        "dir": str(folder),
        "appendonly": "yes",
        "appendfsync": "always",
        "save": "",
        "maxmemory-policy": "noeviction",
        "repl-diskless-sync-delay": "0",
    } | {key.replace("_", "-"): value for key, value in options.items()}
    command = [str(program or valkey.find_server()), *(w for k, v in words.items() for w in (f"--{k}", *_split(v)))]
    return Server(port, folder, command)


def _split(value: str) -> list[str]:
    return value.split(" ") if value else [""]


@contextmanager
def cluster(folder: Path, nodes: int = 3, replicas: int = 0, program: Path | None = None) -> Iterator[Fleet]:
    """A cluster of ``nodes`` primaries, followed by ``replicas`` of each."""
    fleet = Fleet("", [])
    try:
        for number in range(nodes * (1 + replicas)):
            server = durable(
                folder / f"n{number}",
                program,
                cluster_enabled="yes",
                cluster_config_file="nodes.conf",
                cluster_node_timeout="1000",
                cluster_require_full_coverage="no",
            )
            fleet.servers.append(server.start())
        for server in fleet.servers:
            server.await_answer()
        _introduce(fleet.servers, nodes)
        fleet.url = "redis+cluster://" + ",".join(f"{HOST}:{server.port}" for server in fleet.servers[:nodes])
        yield fleet
    finally:
        fleet.kill()


def _introduce(servers: Sequence[Server], nodes: int) -> None:
    for number, server in enumerate(servers[:nodes]):
        first, last = number * SLOTS // nodes, (number + 1) * SLOTS // nodes - 1
        server.client.execute_command("CLUSTER", "ADDSLOTSRANGE", first, last)
    for server in servers[1:]:
        servers[0].client.execute_command("CLUSTER", "MEET", HOST, server.port)
    for server in servers:
        wait_until(lambda server=server: _sees(server, len(servers)), "a cluster that sees its nodes")  # type: ignore[misc]
    for number, server in enumerate(servers[nodes:]):
        primary = servers[number % nodes].client.execute_command("CLUSTER", "MYID")
        server.client.execute_command("CLUSTER", "REPLICATE", primary)
    for server in servers[nodes:]:
        wait_until(lambda server=server: server.client.info()["master_link_status"] == "up", "a replica in step")  # type: ignore[misc]


def _sees(server: Server, count: int) -> bool:
    info = server.client.execute_command("CLUSTER INFO")
    return info["cluster_state"] == "ok" and int(info["cluster_known_nodes"]) == count


@contextmanager
def watched(folder: Path, sentinels: int = 3, program: Path | None = None) -> Iterator[Fleet]:
    """A primary (first), its replica, and sentinels that replace it after a second of silence."""
    fleet = Fleet("", [])
    try:
        primary = durable(folder / "a", program).start().await_answer()
        fleet.servers.append(primary)
        replica = durable(folder / "b", program, replicaof=f"{HOST} {primary.port}").start().await_answer()
        fleet.servers.append(replica)
        wait_until(lambda: in_step(replica, primary), "a replica in step")
        quorum = sentinels // 2 + 1
        fleet.sentinels = [_sentinel(folder / f"s{n}", primary.port, quorum, program) for n in range(sentinels)]
        for sentinel in fleet.sentinels:
            sentinel.start().await_answer()
        for sentinel in fleet.sentinels:
            wait_until(lambda s=sentinel: _watches(s, sentinels - 1), "sentinels that know each other")  # type: ignore[misc]
        hosts = ",".join(f"{HOST}:{sentinel.port}" for sentinel in fleet.sentinels)
        fleet.url = f"redis+sentinel://{hosts}/{SERVICE}"
        yield fleet
    finally:
        fleet.kill()


def _sentinel(folder: Path, primary: int, quorum: int, program: Path | None) -> Server:
    folder.mkdir(parents=True)
    port, config = free_port(), folder / "sentinel.conf"
    config.write_text(
        f"port {port}\nbind {HOST}\ndir {folder}\n"
        f"sentinel monitor {SERVICE} {HOST} {primary} {quorum}\n"
        f"sentinel down-after-milliseconds {SERVICE} 1000\n"
        f"sentinel failover-timeout {SERVICE} 4000\n"
    )
    return Server(port, folder, [str(program or valkey.find_server()), str(config), "--sentinel"])


def _watches(sentinel: Server, others: int) -> bool:
    state = sentinel.client.sentinel_master(SERVICE, return_responses=True)
    assert isinstance(state, dict)
    return int(state["num-slaves"]) == 1 and int(state["num-other-sentinels"]) == others


async def answered(call: Awaitable[object]) -> tuple[bool, float]:
    """Was a call of the store answered, and after how many seconds? False where it raised ``StoreUnavailable``."""
    started = time.monotonic()
    try:
        await call
    except StoreUnavailable:
        return False, time.monotonic() - started
    return True, time.monotonic() - started


async def time_to_fail(call: Awaitable[object]) -> float:
    """Seconds until a call raised ``StoreUnavailable``, which it must."""
    was_answered, seconds = await answered(call)
    assert not was_answered, "the store is expected to be unavailable"
    return seconds


async def until_served(ledger: Ledger, tenants: Iterable[TenantId], patience_s: float = 10.0) -> None:
    """Wait until the ledger answers for each of these tenants."""
    deadline = time.monotonic() + patience_s
    for tenant in tenants:
        while not (await answered(ledger.account(tenant)))[0]:
            assert time.monotonic() < deadline, "the store is back and is not used"
            await asyncio.sleep(0.05)
