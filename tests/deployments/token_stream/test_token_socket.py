"""OutputDelta over a socket of our own: whole and in order, only from who knows the secret, each loss with its end."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator
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
from deployments.token_stream.frames import (
    MOST_FRAME_BYTES,
    NONCE_BYTES,
    PROOF_BYTES,
    BadFrame,
    pack,
    proof,
    read_batch,
)
from deployments.token_stream.link import ReplicaLost, SlowReader
from tests.support.clockwork import ClockworkEngine, Path, job_of, token_path
from tests.support.gateway import until

PIECE = OutputDelta((7,), 'é "quoted" \n', 3, 1, 2, 5, FinishReason.ERROR, "why", is_adapter_rejected=True)


@pytest.fixture
async def path() -> AsyncIterator[Path]:
    async with token_path(ClockworkEngine()) as made:
        yield made


async def test_many_requests_at_once_come_whole_and_in_order(path: Path) -> None:
    outputs = await asyncio.gather(*(path.read(f"r{number}", 40) for number in range(50)))
    for pieces in outputs:
        assert [token for piece in pieces for token in piece.token_ids] == list(range(40))
        assert "".join(piece.text for piece in pieces) == "".join(f"tok{n} " for n in range(40))
        assert pieces[-1].finish_reason is FinishReason.LENGTH
        assert (pieces[-1].completion_tokens, pieces[-1].compute_ms) == (40, 40)
    assert path.engine.running == 0
    assert not path.engine.aborted


async def test_one_step_of_many_requests_is_one_write(path: Path) -> None:
    line = await path.handle.lines.to(path.link._listener.address)
    writes: list[bytes] = []
    line._writer.write = writes.append  # type: ignore[method-assign, assignment]
    for number in range(16):
        line.put(f"r{number}", PIECE)
    await asyncio.sleep(0)
    assert len(writes) == 1
    assert len(await unpacked(writes[0])) == 16


async def test_the_first_token_does_not_wait_for_the_second(path: Path) -> None:
    path.engine.step_s = 0.2
    pieces = path.link.generate(job_of("r", 3))
    assert (await anext(pieces)).token_ids == (0,)
    assert path.engine.emitted["r"] == 1
    await pieces.aclose()


async def test_what_queued_while_the_reader_was_away_comes_at_once(path: Path) -> None:
    pieces = path.link.generate(job_of("r", 30))
    first = await anext(pieces)
    await until(lambda: path.engine.emitted["r"] == 30)
    await asyncio.sleep(0.05)
    rest = [piece async for piece in pieces]
    assert len(rest) == 1
    assert first.token_ids + rest[0].token_ids == tuple(range(30))
    assert rest[0].finish_reason is FinishReason.LENGTH


async def test_a_reader_that_leaves_stops_the_engine(path: Path) -> None:
    pieces = path.link.generate(job_of("r", 100_000))
    await anext(pieces)
    await pieces.aclose()
    await until(lambda: path.engine.aborted == ["r"])
    assert (await path.read("next"))[-1].completion_tokens == 5


async def test_a_reader_that_leaves_before_the_first_token_stops_the_engine(path: Path) -> None:
    path.engine.step_s = 0.1
    reading = asyncio.create_task(path.read("r", 100_000))
    await until(lambda: path.engine.running == 1)
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    await until(lambda: path.engine.aborted == ["r"])


async def test_deadlines_reach_a_replica_that_serve_has_taken_off_its_list(path: Path) -> None:
    """It drains: no broadcast finds it any more, and its streams may be longer than a lease."""
    running = path.link.generate(job_of("r", 100_000))
    await anext(running)
    assert await path.link.extend({"r": 30.0, "over": 30.0}) == frozenset()
    await until(lambda: path.engine.extended == [{"r": 30.0}])
    await running.aclose()


async def test_a_gateway_that_sends_nonsense_loses_its_line(path: Path) -> None:
    running = path.link.generate(job_of("r", 100_000))
    await anext(running)
    [line] = path.link._listener._lines
    line.write((7).to_bytes(4, "big") + b'{"r":"}')
    with pytest.raises(ReplicaLost):
        await read_on(running)
    await until(lambda: path.engine.aborted == ["r"])


async def test_a_slow_reader_is_cancelled_and_what_it_had_not_read_is_bounded() -> None:
    async with token_path(ClockworkEngine(step_s=0.0001), most_waiting_tokens=50) as path:
        pieces = path.link.generate(job_of("slow", 100_000))
        await anext(pieces)
        await until(lambda: path.engine.aborted == ["slow"])
        assert path.link._listener.slow == {"slow"}
        last = await anext(pieces)
        assert last.completion_tokens < 500
        with pytest.raises(SlowReader, match="unread"):
            await anext(pieces)
        assert not path.link._listener.slow
        assert (await path.read("quick", 30))[-1].completion_tokens == 30


@pytest.mark.parametrize("refusal", [Overloaded("full"), AdapterRejected("bad"), RequestRejected("no")])
async def test_a_refusal_comes_through_the_call_and_nothing_else_ends(path: Path, refusal: Exception) -> None:
    other = path.link.generate(job_of("other", 100_000))
    await anext(other)
    path.engine.refusal = refusal  # type: ignore[assignment]
    with pytest.raises(type(refusal), match=str(refusal)):
        await path.read("r")
    assert (await anext(other)).finish_reason is None
    await other.aclose()


@pytest.mark.parametrize(
    ("failure", "told"),
    [
        (BackPressureError(num_queued_requests=1, max_queued_requests=1), Overloaded),
        (RayActorError(), ReplicaLost),
        (ValueError("a bug"), EngineFailed),
    ],
)
async def test_a_call_that_fails_is_told_to_its_reader(path: Path, failure: Exception, told: type[Exception]) -> None:
    path.handle.failure = failure
    with pytest.raises(told):
        await path.read("r")


async def test_a_call_that_serve_cancels_ends_as_a_reader_that_left(path: Path) -> None:
    path.handle.failure = asyncio.CancelledError()
    with pytest.raises(asyncio.CancelledError):
        await path.read("r")


async def test_a_call_that_ends_without_a_last_piece_is_our_failure(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway_end, "LAST_PIECE_PATIENCE_S", 0.01)
    path.handle.ends_silently = True
    with pytest.raises(EngineFailed, match="last piece"):
        await path.read("r")


async def read_on(pieces: AsyncIterator[OutputDelta]) -> None:
    async for _ in pieces:
        pass


async def test_a_dropped_socket_loses_its_requests_and_the_next_dials_again(path: Path) -> None:
    running = [path.link.generate(job_of(f"r{number}", 100_000)) for number in range(3)]
    for pieces in running:
        await anext(pieces)
    [line] = path.link._listener._lines
    line.transport.abort()
    for pieces in running:
        with pytest.raises(ReplicaLost):
            await read_on(pieces)
    await until(lambda: len(path.engine.aborted) == 3)
    assert (await path.read("next"))[-1].completion_tokens == 5


async def test_a_lost_gateway_stops_everything_it_had_running(path: Path) -> None:
    path.engine.step_s = 0.02
    running = [asyncio.create_task(path.read(f"r{number}", 100_000)) for number in range(3)]
    await until(lambda: len(path.engine.emitted) == 3)
    await path.link.close()
    await until(lambda: len(path.engine.aborted) == 3)
    for error in await asyncio.gather(*running, return_exceptions=True):
        assert isinstance(error, ReplicaLost)
    with pytest.raises(ReplicaLost, match="cannot be reached"):
        await path.read("next")


async def test_a_gateway_that_does_not_read_is_given_up(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica_end, "MOST_UNSENT_BYTES", 10_000)
    address = path.link._listener.address
    line = await path.handle.lines.to(address)
    [theirs] = path.link._listener._lines
    theirs.transport.pause_reading()
    carrying = asyncio.create_task(line.carry(job_of("r", 100_000), path.engine))
    await asyncio.sleep(0)
    while line.is_up:
        line.put("other", PIECE)
        await asyncio.sleep(0)
    with pytest.raises(ReplicaLost):
        await carrying
    assert await path.handle.lines.to(address) is not line


async def greeting(path: Path, secret: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """As a replica dials, with whatever secret."""
    address = path.link._listener.address
    reader, writer = await asyncio.open_connection(address.host, address.port)
    nonce = await reader.readexactly(NONCE_BYTES)
    writer.write(proof(secret, "replica", nonce) + b"n" * NONCE_BYTES)
    return reader, writer


async def test_who_does_not_know_the_secret_is_hung_up_on(path: Path) -> None:
    reader, writer = await greeting(path, b"guess" * 6)
    assert await reader.read() == b""
    writer.close()


async def test_deadlines_moved_during_a_greeting_stay_out_of_it(path: Path) -> None:
    reading = asyncio.create_task(path.read("r", 100_000))
    await until(lambda: path.engine.running == 1)
    address = path.link._listener.address
    reader, writer = await asyncio.open_connection(address.host, address.port)
    nonce = await reader.readexactly(NONCE_BYTES)
    path.link._listener._inflows["r"].source = None  # as of a job that has not said where it runs
    await path.link.extend({"r": 9.0})
    writer.write(proof(address.secret, "replica", nonce) + b"n" * NONCE_BYTES)
    answer = await reader.readexactly(PROOF_BYTES)
    assert frames.is_proof(answer, address.secret, "gateway", b"n" * NONCE_BYTES)
    reading.cancel()
    writer.close()


async def test_a_gateway_that_cannot_prove_itself_gets_no_tokens(path: Path) -> None:
    async def impostor(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"n" * NONCE_BYTES)
        claimed = await reader.readexactly(PROOF_BYTES + NONCE_BYTES)
        writer.write(claimed[:PROOF_BYTES])  # what it was told, sent back
        assert await reader.read() == b""
        writer.close()

    server = await asyncio.start_server(impostor, "127.0.0.1", 0)
    real = path.link._listener.address
    forged = type(real)("127.0.0.1", server.sockets[0].getsockname()[1], real.secret)
    with pytest.raises(ReplicaLost):
        await path.handle.lines.to(forged)
    server.close()
    assert real.secret.hex() not in repr(real)
    assert str(real.secret) not in repr(real)


@pytest.mark.parametrize(
    "sent",
    [
        (MOST_FRAME_BYTES + 1).to_bytes(4, "big"),
        (0).to_bytes(4, "big"),
        (9).to_bytes(4, "big") + b"not JSON!",
        pack([("mine", PIECE)]),  # a request that runs on another line
    ],
)
async def test_a_line_that_sends_nonsense_is_closed_and_harms_no_other(path: Path, sent: bytes) -> None:
    mine = path.link.generate(job_of("mine", 100_000))
    await anext(mine)
    reader, writer = await greeting(path, path.link._listener.address.secret)
    await reader.readexactly(PROOF_BYTES)
    writer.write(sent)
    assert await reader.read() == b""
    writer.close()
    assert "quoted" not in (await anext(mine)).text
    await mine.aclose()


async def test_a_line_that_says_nothing_is_closed_in_time(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway_end, "PROOF_TIMEOUT_S", 0.05)
    address = path.link._listener.address
    with socket.create_connection((address.host, address.port), timeout=5) as silent:
        await until(lambda: len(path.link._listener._lines) == 1)
        await until(lambda: not path.link._listener._lines)
        silent.recv(NONCE_BYTES)


async def test_no_more_lines_than_there_may_be_replicas(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway_end, "MOST_LINES", 0)
    address = path.link._listener.address
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


async def test_a_frame_keeps_every_field() -> None:
    logprob = Logprob(7, float("-inf"), ((8, -0.1), (9, float("-inf"))))
    choices = (Choice(0, "a", (logprob,)), Choice(1, "b", finish_reason=FinishReason.STOP))
    batch = [("a", PIECE), ("b", OutputDelta((), "", 1, 0, 0)), ("c", replace(PIECE, choices=choices))]
    assert await unpacked(pack(batch)) == batch


async def test_a_batch_longer_than_a_frame_travels_in_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "MOST_FRAME_BYTES", 1_000)
    batch = [(f"r{number}", PIECE) for number in range(100)]
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
async def test_a_frame_is_parsed_strictly(body: object) -> None:
    sent = json.dumps(body).encode()
    with pytest.raises(BadFrame):
        await unpacked(len(sent).to_bytes(4, "big") + sent)
