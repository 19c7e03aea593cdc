"""Tokens reach the gateway in order and whole: the first at once, the last at once, those between in company."""

import asyncio
import threading
import time
from dataclasses import replace

from deployments.inference.request import Choice, FinishReason, OutputDelta
from deployments.token_stream.pieces import SEND_INTERVAL_S, Outbox, join


def token(number: int, last: bool = False) -> OutputDelta:
    reason = FinishReason.STOP if last else None
    return OutputDelta((number,), f"{number} ", 3, 0, number + 1, compute_ms=number, finish_reason=reason)


async def read(outbox: Outbox) -> list[tuple[float, OutputDelta]]:
    return [(time.monotonic(), piece) async for piece in outbox.pieces()]


def test_joined_pieces_keep_their_order_and_the_last_totals() -> None:
    joined = join([token(0), token(1), token(2, last=True)])
    assert joined.token_ids == (0, 1, 2)
    assert joined.text == "0 1 2 "
    assert (joined.completion_tokens, joined.compute_ms, joined.finish_reason) == (3, 2, FinishReason.STOP)


def test_joined_pieces_keep_every_answer_and_every_field_of_the_last() -> None:
    first = OutputDelta((1,), "a", 3, 2, 1, choices=(Choice(0, "a"),))
    last = OutputDelta((2,), "b", 3, 2, 2, 9, FinishReason.ERROR, "why", True, (Choice(1, "b"),))
    assert join([first, last]) == replace(last, token_ids=(1, 2), text="ab", choices=(Choice(0, "a"), Choice(1, "b")))


async def test_tokens_of_another_thread_arrive_in_order_and_in_company() -> None:
    outbox = Outbox(asyncio.get_running_loop())

    def engine() -> None:
        for number in range(50):
            time.sleep(0.001)
            outbox.put(token(number, last=number == 49))

    thread = threading.Thread(target=engine)
    thread.start()
    pieces = [piece for _, piece in await read(outbox)]
    thread.join()
    assert [number for piece in pieces for number in piece.token_ids] == list(range(50))
    assert pieces[0].token_ids == (0,)
    assert 2 < len(pieces) < 25
    assert pieces[-1].finish_reason is FinishReason.STOP


async def test_the_last_piece_waits_for_no_company() -> None:
    outbox = Outbox(asyncio.get_running_loop())
    outbox.put(token(0))
    reading = asyncio.create_task(read(outbox))
    await asyncio.sleep(SEND_INTERVAL_S / 10)
    outbox.put(token(1, last=True))
    (first, _), (last, _) = await reading
    assert last - first < SEND_INTERVAL_S


def test_an_engine_that_outlives_its_listener_is_not_disturbed() -> None:
    loop = asyncio.new_event_loop()
    outbox = Outbox(loop)
    loop.close()
    outbox.put(token(0))
