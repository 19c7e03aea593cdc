"""``python -m tests.bench.token_path``: the token stream, Serve's streaming and the floor, in both of Serve's modes.

Streams of 64 tokens, a step of 5 ms, 32 clients, on one Serve cluster per mode; the transports take turns.
"""

import argparse
import asyncio
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import psutil

from tests.bench import figures
from tests.bench.figures import Row
from tests.bench.token_apps import FLOOR, SERVE, SOCKET
from tests.support.serve_cluster import ANSWER, REPO, cmdline_of, environment, stop
from tests.support.waiting import free_port

TOKENS = 64
HAPROXY, DEFAULT = MODES = ("haproxy", "default")
SECTIONS = {HAPROXY: "token_path", DEFAULT: "token_path-default"}
START_TIMEOUT_S = 60.0
NAMES = {
    FLOOR: "the engine inside the gateway (floor)",
    SOCKET: "the product's token stream",
    SERVE: "Serve's streaming, each token at once",
}
SHARED = ("haproxy", "ray::ProxyActor")
"""Processes that take part in every request, by their command lines."""


@dataclass
class Seen:
    """What the clients of one round measured, in seconds."""

    first: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    """Between two chunks of a stream: a chunk may hold several tokens."""
    chunks: int = 0
    streams: int = 0
    elapsed_s: float = 0.0
    cpu_s: float = 0.0

    @property
    def cpu_ms(self) -> float:
        return self.cpu_s * 1000 / self.streams


@dataclass(frozen=True, slots=True)
class Served:
    """A running cluster with all transports."""

    process: "subprocess.Popen[str]"
    port: int

    def pids(self, transport: str) -> list[int]:
        """Gateway, replica and proxies."""
        wanted = (f"ray::ServeReplica:{transport}:", *SHARED)
        family = psutil.Process(self.process.pid).children(recursive=True)
        return [child.pid for child in family if any(word in " ".join(cmdline_of(child)[:3]) for word in wanted)]


@contextmanager
def serving(haproxy: bool) -> Iterator[Served]:
    folder = Path(tempfile.mkdtemp(prefix="b", dir="/tmp"))
    apps = [
        {
            "name": name,
            "route_prefix": f"/{name}",
            "import_path": "tests.bench.token_apps:build",
            "args": {"transport": name},
            "logging_config": {"enable_access_log": False},  # as in the product
        }
        for name in NAMES
    ]
    (folder / "config.json").write_text(json.dumps({"applications": apps}))
    port = free_port()
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.serve_process", str(folder / "config.json"), str(port), ANSWER],
            env=environment("", folder, haproxy),
            cwd=REPO,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,
        )
        try:
            assert process.stdout is not None
            if not any(line.strip() == "READY" for line in process.stdout):
                raise SystemExit((folder / "log").read_text()[-3000:])
            served = Served(process, port)
            for name in NAMES:
                asyncio.run(wait_for(served, name))
            yield served
        finally:
            stop(process)
            shutil.rmtree(folder, ignore_errors=True)


async def wait_for(served: Served, transport: str) -> None:
    """HAProxy serves an application a moment after Serve calls it running; this also opens sockets and routes."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        with suppress(AssertionError, OSError):
            await load(served, transport, 4, 2)
            return
        await asyncio.sleep(0.5)
    raise SystemExit(f"{transport} does not answer")


async def stream(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, transport: str, seen: Seen) -> None:
    """One stream over a kept connection; of a chunk only its beginning is parsed."""
    started = last = time.perf_counter()
    writer.write(f"POST /{transport}/{TOKENS} HTTP/1.1\r\nhost: bench\r\ncontent-length: 0\r\n\r\n".encode())
    tokens = 0
    while (line := await reader.readline()) != b"0\r\n":
        assert line, "the connection ended in a stream"
        if not line.startswith(b"data: {"):
            continue
        now = time.perf_counter()
        (seen.first if not tokens else seen.gaps).append(now - (last if tokens else started))
        last, seen.chunks = now, seen.chunks + 1
        tokens += line.count(b"tok")
    await reader.readline()
    assert tokens == TOKENS, f"{tokens} of {TOKENS} tokens came"
    seen.streams += 1


async def load(served: Served, transport: str, clients: int, streams: int) -> Seen:
    """A closed loop: each client sends its next request when its stream has ended."""
    seen = Seen()

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
        for _ in range(streams):
            await stream(reader, writer, transport, seen)
        writer.close()

    pids = served.pids(transport)
    before, started = figures.cpu_s(*pids), time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    seen.elapsed_s, seen.cpu_s = time.perf_counter() - started, figures.cpu_s(*pids) - before
    return seen


def rounds(haproxy: bool, count: int, clients: int, streams: int) -> dict[str, list[Seen]]:
    found: dict[str, list[Seen]] = {name: [] for name in NAMES}
    with serving(haproxy) as served:
        for turn in range(count):
            for name in list(NAMES) if turn % 2 == 0 else reversed(NAMES):
                found[name].append(asyncio.run(load(served, name, clients, streams)))
    return found


def shown(found: dict[str, list[Seen]]) -> str:
    floor = median(seen.cpu_ms for seen in found[FLOOR])
    lines = []
    for name, label in NAMES.items():
        first = figures.middle([figures.latency(seen.first) for seen in found[name]])
        gaps = figures.middle([figures.latency(seen.gaps) for seen in found[name]])
        cpu = median(seen.cpu_ms for seen in found[name])
        speed = median(seen.streams * TOKENS / seen.elapsed_s for seen in found[name])
        each = median(seen.streams * TOKENS / seen.chunks for seen in found[name])
        numbers = (cpu, cpu / floor, first.p50, first.p99, gaps.p50, gaps.p99, each, speed)
        lines.append([label, *(figures.plain(number) for number in numbers)])
    heads = ["", "CPU ms / stream", "/ floor", "first token p50 ms", "p99", "chunk gap p50 ms", "p99", "tokens / chunk"]
    return figures.table([*heads, "tokens/s"], lines)


def rows(fast: dict[str, list[Seen]]) -> Sequence[Row]:
    cpu = {name: median(seen.cpu_ms for seen in fast[name]) for name in NAMES}
    return [
        figures.at_most("CPU of a stream over the socket, behind HAProxy", cpu[SOCKET], 4.0, "ms"),
        Row("Serve's streaming, each token at once, over it", f"{figures.plain(cpu[SERVE] / cpu[SOCKET])} x"),
        Row("the socket over the floor", f"{figures.plain(cpu[SOCKET] / cpu[FLOOR])} x"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--streams", type=int, default=8, help="of each client in a round")
    parser.add_argument("--dry", action="store_true", help="print only; leave BENCHMARKS.md as it is")
    parser.add_argument("--mode", choices=MODES, help="one of Serve's modes; both if it is left out")
    asked = parser.parse_args()
    for mode in [asked.mode] if asked.mode else MODES:
        where = figures.machine()
        found = rounds(mode == HAPROXY, asked.rounds, asked.clients, asked.streams)
        text = f"{where}; medians of {asked.rounds} rounds, {asked.clients} clients.\n\n"
        text += f"{figures.verdicts(rows(found))}\n\n{shown(found)}" if mode == HAPROXY else shown(found)
        print(text)
        if not asked.dry:
            figures.put(SECTIONS[mode], text)


if __name__ == "__main__":
    main()
