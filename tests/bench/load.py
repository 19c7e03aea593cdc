"""A closed loop of HTTP clients on plain sockets, which need little of this machine's CPU."""

import asyncio
import time
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from tests.bench import figures
from tests.bench.figures import Latency

READ_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Target:
    """Where a request goes, and its body."""

    url: str
    key: str
    body: bytes
    is_stream: bool = False

    def request(self) -> bytes:
        place = urlsplit(self.url)
        lines = [f"POST {place.path} HTTP/1.1", f"Host: {place.netloc}", "Content-Type: application/json"]
        lines += [f"Content-Length: {len(self.body)}", f"Authorization: Bearer {self.key}", "", ""]
        return "\r\n".join(lines).encode() + self.body


@dataclass
class Window:
    """What the clients measured in one window."""

    seconds: list[float] = field(default_factory=list)
    window_s: float = 0.0

    @property
    def per_s(self) -> float:
        return len(self.seconds) / self.window_s

    @property
    def latency(self) -> Latency:
        return figures.latency(self.seconds)


async def drive(target: Target, clients: int, window_s: float) -> Window:
    """So many clients, each of which sends its next request at once, until the window ends."""
    window = Window()
    started = time.perf_counter()
    await asyncio.gather(*(_client(target, window, started + window_s) for _ in range(clients)))
    window.window_s = time.perf_counter() - started
    return window


async def _client(target: Target, window: Window, until: float) -> None:
    place = urlsplit(target.url)
    reader, writer = await asyncio.open_connection(place.hostname, place.port)
    request = target.request()
    try:
        while (asked := time.perf_counter()) < until:
            writer.write(request)
            await _answer(reader, target.is_stream)
            window.seconds.append(time.perf_counter() - asked)
    finally:
        writer.close()


async def _answer(reader: asyncio.StreamReader, is_stream: bool) -> None:
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    if b"content-length:" in head:
        length = int(head.partition(b"content-length:")[2].partition(b"\r\n")[0])
        body = await reader.readexactly(length)
    else:
        body = await _chunks(reader)
    assert head.startswith(b"http/1.1 200"), (head + body).decode(errors="replace")
    assert not is_stream or b"[DONE]" in body, f"a stream without its end: {body[-500:]!r}"


async def _chunks(reader: asyncio.StreamReader) -> bytes:
    """A chunked body as it came, with the sizes of its chunks; the last chunk is empty."""
    body = b""
    while not body.endswith(b"0\r\n\r\n"):
        more = await reader.read(READ_BYTES)
        assert more, "the server closed the connection"
        body += more
    return body
