"""The token stream over a real socket: order, coalescing, refusals, lost connections, the handshake and frames."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError

from deployments.inference.request import (
    AdapterRejected,
    Choice,
    EngineFailed,
    FinishReason,
    Logprob,
    OutputDelta,
    Overloaded,
    RequestRejected,
)
from deployments.token_stream import frames, gateway_end, replica_end
from deployments.token_stream.errors import ReplicaLost, SlowReader
from deployments.token_stream.frames import (
    MAX_FRAME_BYTES,
    NONCE_BYTES,
    PROOF_BYTES,
    SECRET_BYTES,
    Address,
    BadFrame,
    Batch,
    pack,
    proof,
    read_batch,
)
from tests.support.clockwork import ClockworkEngine, TokenPath, request_of, token_path
from tests.support.waiting import until

DELTA = OutputDelta((7,), 'é "quoted" \n', 3, 1, 2, 5, FinishReason.ERROR, "why", is_adapter_rejected=True)


@pytest.fixture
async def path() -> AsyncIterator[TokenPath]:
    async with token_path(ClockworkEngine()) as made:
        yield made


async def test_concurrent_outputs_whole_and_in_order(path: TokenPath) -> None:
    outputs = await asyncio.gather(*(path.read(f"r{number}", 40) for number in range(50)))
    for deltas in outputs:
        assert [token for delta in deltas for token in delta.token_ids] == list(range(40))
        assert "".join(delta.text for delta in deltas) == "".join(f"tok{n} " for n in range(40))
        assert deltas[-1].finish_reason is FinishReason.LENGTH
        assert (deltas[-1].completion_tokens, deltas[-1].compute_ms) == (40, 40)
    assert path.engine.running == 0
    assert not path.engine.aborted


@asynccontextmanager
async def fake_gateway(
    serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> AsyncIterator[Address]:
    """A listener that proves its secret to the replica, and then does what ``serve`` does."""
    secret = b"s" * SECRET_BYTES

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"n" * NONCE_BYTES)
        await reader.readexactly(PROOF_BYTES)
        writer.write(proof(secret, "gateway", await reader.readexactly(NONCE_BYTES)))
        await serve(reader, writer)
        writer.close()

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    try:
        yield Address("127.0.0.1", server.sockets[0].getsockname()[1], secret)
    finally:
        server.close()


async def test_one_frame_per_step(path: TokenPath) -> None:
    batches: list[Batch] = []

    async def serve(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        batches.append(await read_batch(reader))

    async with fake_gateway(serve) as address:
        connection = await path.handle.gateways.to(address)
        for number in range(16):
            connection.put(f"r{number}", DELTA)
        await until(lambda: batches)
    assert len(batches[0]) == 16


async def test_first_token_is_sent_at_once(path: TokenPath) -> None:
    path.engine.step_s = 0.2
    deltas = path.link.generate(request_of("r", 3))
    assert (await anext(deltas)).token_ids == (0,)
    assert path.engine.emitted["r"] == 1
    await deltas.aclose()


async def test_unread_deltas_are_coalesced(path: TokenPath) -> None:
    deltas = path.link.generate(request_of("r", 30))
    first = await anext(deltas)
    await until(lambda: path.engine.emitted["r"] == 30)
    await asyncio.sleep(0.05)
    rest = [delta async for delta in deltas]
    assert len(rest) == 1
    assert first.token_ids + rest[0].token_ids == tuple(range(30))
    assert rest[0].finish_reason is FinishReason.LENGTH


async def test_closed_reader_aborts_request(path: TokenPath) -> None:
    deltas = path.link.generate(request_of("r", 100_000))
    await anext(deltas)
    await deltas.aclose()
    await until(lambda: path.engine.aborted == ["r"])
    assert (await path.read("next"))[-1].completion_tokens == 5


async def test_reader_cancelled_before_first_token_aborts_request(path: TokenPath) -> None:
    path.engine.step_s = 0.1
    reading = asyncio.create_task(path.read("r", 100_000))
    await until(lambda: path.engine.running == 1)
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    await until(lambda: path.engine.aborted == ["r"])


async def test_deadlines_reach_draining_replica(path: TokenPath) -> None:
    """Serve's broadcast leaves out a replica that drains, and its streams may be longer than a lease."""
    running = path.link.generate(request_of("r", 100_000))
    await anext(running)
    assert await path.link.extend({"r": 30.0, "over": 30.0}) == frozenset()
    await until(lambda: path.engine.extended == [{"r": 30.0}])
    await running.aclose()


async def test_gateway_sending_bad_frame_is_disconnected(path: TokenPath) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_batch(reader)
        writer.write((7).to_bytes(4, "big") + b'{"r":"}')
        await writer.drain()

    async with fake_gateway(serve) as address:
        connection = await path.handle.gateways.to(address)
        with pytest.raises(ReplicaLost):
            await connection.run(request_of("r", 100_000), path.engine)
    assert path.engine.aborted == ["r"]


async def test_slow_reader_is_cancelled() -> None:
    async with token_path(ClockworkEngine(step_s=0.0001), max_unread_tokens=50) as path:
        deltas = path.link.generate(request_of("slow", 100_000))
        await anext(deltas)
        await until(lambda: path.engine.aborted == ["slow"])
        assert path.link.listener.slow == {"slow"}
        last = await anext(deltas)
        assert last.completion_tokens < 500
        with pytest.raises(SlowReader, match="unread"):
            await anext(deltas)
        assert not path.link.listener.slow
        assert (await path.read("quick", 30))[-1].completion_tokens == 30


@pytest.mark.parametrize("refusal", [Overloaded("full"), AdapterRejected("bad"), RequestRejected("no")])
async def test_refusal_ends_only_its_request(path: TokenPath, refusal: Exception) -> None:
    other = path.link.generate(request_of("other", 100_000))
    await anext(other)
    path.engine.refusal = refusal  # type: ignore[assignment]
    with pytest.raises(type(refusal), match=str(refusal)):
        await path.read("r")
    assert (await anext(other)).finish_reason is None
    await other.aclose()


@pytest.mark.parametrize(
    ("failure", "raised"),
    [
        (BackPressureError(num_queued_requests=1, max_queued_requests=1), Overloaded),
        (RayActorError(), ReplicaLost),
        (ValueError("a bug"), EngineFailed),
    ],
)
async def test_failed_call_raises_in_reader(path: TokenPath, failure: Exception, raised: type[Exception]) -> None:
    path.handle.failure = failure
    with pytest.raises(raised):
        await path.read("r")


async def test_call_cancelled_by_serve_cancels_reader(path: TokenPath) -> None:
    path.handle.failure = asyncio.CancelledError()
    with pytest.raises(asyncio.CancelledError):
        await path.read("r")


async def test_call_without_last_delta_fails(path: TokenPath, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway_end, "LAST_DELTA_TIMEOUT_S", 0.01)
    path.handle.ends_silently = True
    with pytest.raises(EngineFailed, match="last delta"):
        await path.read("r")


async def read_on(deltas: AsyncIterator[OutputDelta]) -> None:
    async for _ in deltas:
        pass


async def test_dropped_socket_fails_requests_and_reconnects(path: TokenPath) -> None:
    running = [path.link.generate(request_of(f"r{number}", 100_000)) for number in range(3)]
    for deltas in running:
        await anext(deltas)
    path.link.listener.drop_connections()
    for deltas in running:
        with pytest.raises(ReplicaLost):
            await read_on(deltas)
    await until(lambda: len(path.engine.aborted) == 3)
    assert (await path.read("next"))[-1].completion_tokens == 5


async def test_lost_gateway_aborts_its_requests(path: TokenPath) -> None:
    path.engine.step_s = 0.02
    running = [asyncio.create_task(path.read(f"r{number}", 100_000)) for number in range(3)]
    await until(lambda: len(path.engine.emitted) == 3)
    await path.link.close()
    await until(lambda: len(path.engine.aborted) == 3)
    for error in await asyncio.gather(*running, return_exceptions=True):
        assert isinstance(error, ReplicaLost)
    with pytest.raises(ReplicaLost, match="cannot be reached"):
        await path.read("next")


async def test_gateway_that_does_not_read_is_disconnected(path: TokenPath, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica_end, "MAX_UNSENT_BYTES", 10_000)
    is_over = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        await is_over.wait()

    async with fake_gateway(serve) as address:
        connection = await path.handle.gateways.to(address)
        running = asyncio.create_task(connection.run(request_of("r", 100_000), path.engine))
        await asyncio.sleep(0)
        while connection.is_up:
            connection.put("other", DELTA)
            await asyncio.sleep(0)
        with pytest.raises(ReplicaLost):
            await running
        assert await path.handle.gateways.to(address) is not connection
        is_over.set()


async def handshake(path: TokenPath, secret: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect as a replica does, with whatever secret."""
    address = path.link.listener.address
    reader, writer = await asyncio.open_connection(address.host, address.port)
    nonce = await reader.readexactly(NONCE_BYTES)
    writer.write(proof(secret, "replica", nonce) + b"n" * NONCE_BYTES)
    return reader, writer


async def test_wrong_secret_is_disconnected(path: TokenPath) -> None:
    reader, writer = await handshake(path, b"guess" * 6)
    assert await reader.read() == b""
    writer.close()


async def test_deadlines_not_sent_during_handshake(path: TokenPath) -> None:
    path.engine.step_s = 1.0
    await asyncio.sleep(0.02)
    reading = asyncio.create_task(path.read("r", 100_000))  # without a token its replica is unknown
    await until(lambda: path.engine.running == 1)
    address = path.link.listener.address
    reader, writer = await asyncio.open_connection(address.host, address.port)
    nonce = await reader.readexactly(NONCE_BYTES)
    await path.link.extend({"r": 9.0})
    writer.write(proof(address.secret, "replica", nonce) + b"n" * NONCE_BYTES)
    answer = await reader.readexactly(PROOF_BYTES)
    assert frames.is_proof(answer, address.secret, "gateway", b"n" * NONCE_BYTES)
    reading.cancel()
    writer.close()


async def test_impostor_gateway_gets_no_tokens(path: TokenPath) -> None:
    async def impostor(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"n" * NONCE_BYTES)
        claimed = await reader.readexactly(PROOF_BYTES + NONCE_BYTES)
        writer.write(claimed[:PROOF_BYTES])  # the replica's own proof, sent back
        assert await reader.read() == b""
        writer.close()

    server = await asyncio.start_server(impostor, "127.0.0.1", 0)
    real = path.link.listener.address
    forged = type(real)("127.0.0.1", server.sockets[0].getsockname()[1], real.secret)
    with pytest.raises(ReplicaLost):
        await path.handle.gateways.to(forged)
    server.close()
    assert real.secret.hex() not in repr(real)
    assert str(real.secret) not in repr(real)


@pytest.mark.parametrize(
    "sent",
    [
        (MAX_FRAME_BYTES + 1).to_bytes(4, "big"),
        (0).to_bytes(4, "big"),
        (9).to_bytes(4, "big") + b"not JSON!",
        pack([("mine", DELTA)]),  # a request that runs on another replica
    ],
)
async def test_replica_sending_bad_frame_is_disconnected(path: TokenPath, sent: bytes) -> None:
    mine = path.link.generate(request_of("mine", 100_000))
    await anext(mine)
    reader, writer = await handshake(path, path.link.listener.address.secret)
    await reader.readexactly(PROOF_BYTES)
    writer.write(sent)
    assert await reader.read() == b""
    writer.close()
    assert "quoted" not in (await anext(mine)).text
    await mine.aclose()


async def test_silent_connection_times_out(path: TokenPath, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway_end, "PROOF_TIMEOUT_S", 0.05)
    address = path.link.listener.address
    with socket.create_connection((address.host, address.port), timeout=5) as silent:
        await until(lambda: path.link.listener.connections == 1)
        await until(lambda: path.link.listener.connections == 0)
        silent.recv(NONCE_BYTES)


async def test_connections_are_bounded(path: TokenPath, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway_end, "MAX_CONNECTIONS", 0)
    address = path.link.listener.address
    reader, writer = await asyncio.open_connection(address.host, address.port)
    assert await reader.read() == b""
    writer.close()


async def unpacked(sent: bytes) -> list[tuple[str, OutputDelta]]:
    reader, batch = asyncio.StreamReader(), []
    reader.feed_data(sent)
    reader.feed_eof()
    while not reader.at_eof():
        batch += await read_batch(reader)
    return batch


async def test_frame_keeps_every_field() -> None:
    logprob = Logprob(7, float("-inf"), ((8, -0.1), (9, float("-inf"))))
    choices = (Choice(0, "a", (logprob,)), Choice(1, "b", finish_reason=FinishReason.STOP))
    batch = [("a", DELTA), ("b", OutputDelta((), "", 1, 0, 0)), ("c", replace(DELTA, choices=choices))]
    assert await unpacked(pack(batch)) == batch


async def test_long_batch_takes_several_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "MAX_FRAME_BYTES", 1_000)
    batch = [(f"r{number}", DELTA) for number in range(100)]
    assert await unpacked(pack(batch)) == batch


@pytest.mark.parametrize(
    "body",
    [
        [["a"]],
        [["a", {"text": ""}]],
        [["a", {"token_ids": ["7"], "text": "", "prompt_tokens": 1, "cached_tokens": 0, "completion_tokens": 1}]],
        [["a", {"token_ids": [7], "text": "", "prompt_tokens": 1.5, "cached_tokens": 0, "completion_tokens": 1}]],
        [[1, {"token_ids": [7], "text": "", "prompt_tokens": 1, "cached_tokens": 0, "completion_tokens": 1}]],
        {"a": 1},
    ],
)
async def test_frame_is_parsed_strictly(body: object) -> None:
    sent = json.dumps(body).encode()
    with pytest.raises(BadFrame):
        await unpacked(len(sent).to_bytes(4, "big") + sent)
