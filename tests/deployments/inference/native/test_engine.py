"""The engine: seeds, stops, aborts, deadlines, rejections and failures. Every request gets a last delta."""

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from deployments.inference.native.engine import Engine
from deployments.inference.native.settings import EngineSettings
from deployments.inference.request import (
    AdapterRef,
    EngineFailed,
    FinishReason,
    GenerateRequest,
    OutputDelta,
    Overloaded,
    RequestRejected,
    SamplingParams,
)
from tests.support.engine import Collector, request, run
from tests.support.models import VOCABULARY

PROMPT = (5, 6, 7, 8)


def _idle(engine: Engine) -> None:
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.queued_tokens, stats.kv_blocks_used) == (0, 0, 0, 0)


def test_seed_gives_the_same_tokens_in_any_batch(engine: Engine, refs: dict[str, AdapterRef]) -> None:
    names = [None, *refs]

    def seeded(i: int) -> GenerateRequest:
        sampling = SamplingParams(max_tokens=20, temperature=0.9, top_p=0.95, seed=i % 4, ignore_eos=True)
        name = names[i % len(names)]
        return request(f"r{i}", (4 + i, *PROMPT), refs[name] if name else None, sampling=sampling)

    crowd = run(engine, *(seeded(i) for i in range(20)))
    for i in (0, 1, 6, 13, 19):
        assert run(engine, seeded(i))[0].token_ids == crowd[i].token_ids


def test_tokens_differ_without_seed(engine: Engine) -> None:
    sampling = SamplingParams(max_tokens=30, temperature=1.5, ignore_eos=True)
    first, second = run(engine, request("a", sampling=sampling), request("b", sampling=sampling))
    assert first.token_ids != second.token_ids


def test_presence_penalty_reduces_repetition(engine: Engine) -> None:
    def answer(penalty: float) -> tuple[int, ...]:
        sampling = SamplingParams(max_tokens=60, temperature=0.0, presence_penalty=penalty, ignore_eos=True)
        return run(engine, request("r", PROMPT, sampling=sampling))[0].token_ids

    assert len(set(answer(2.0))) > len(set(answer(0.0))) > len(set(answer(-2.0)))


def test_delta_counts_are_running_totals(engine: Engine) -> None:
    one = run(engine, request("r", PROMPT, max_tokens=40))[0]
    assert one.text == engine.text.decode(one.token_ids)
    assert [delta.completion_tokens for delta in one.deltas] == list(range(1, 41))
    assert {delta.prompt_tokens for delta in one.deltas} == {4}
    assert [delta.finish_reason for delta in one.deltas[:-1]] == [None] * 39
    assert one.deltas[-1].finish_reason is FinishReason.LENGTH
    assert one.deltas[-1].compute_ms > 0
    _idle(engine)


def test_compute_time_is_shared_not_counted_twice(engine: Engine) -> None:
    started = time.perf_counter()
    answers = run(engine, *(request(f"r{i}", (4 + i, *PROMPT), max_tokens=30) for i in range(6)))
    elapsed_ms = (time.perf_counter() - started) * 1000
    assert 0 < sum(answer.deltas[-1].compute_ms for answer in answers) <= elapsed_ms + 6


def test_stop_string_ends_the_text_before_it(engine: Engine) -> None:
    whole = run(engine, request("whole", PROMPT, max_tokens=40))[0].text
    for start, end in ((5, 9), (12, 13), (20, 27)):
        stop = whole[start:end]
        if "\ufffd" in stop:
            continue
        sampling = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True, stop=(stop, "no such"))
        one = run(engine, request("r", PROMPT, sampling=sampling))[0]
        assert one.text == whole[: whole.index(stop)]
        assert one.deltas[-1].finish_reason is FinishReason.STOP


def test_end_token_is_counted_and_not_shown(engine: Engine) -> None:
    """End token 0 is made certain by a penalty that pushes up what was generated, once it was generated."""
    for i in range(4, 60):
        tokens = run(engine, request("r", (i,), max_tokens=60))[0].token_ids
        if 0 in tokens:
            break
    else:
        pytest.fail("no prompt leads to the end token")
    sampling = SamplingParams(max_tokens=60, temperature=0.0)
    one = run(engine, request("r", (i,), sampling=sampling))[0]
    assert one.token_ids == tokens[: tokens.index(0) + 1]
    assert one.deltas[-1].finish_reason is FinishReason.STOP
    assert "<|end|>" not in one.text


def test_completion_ends_with_the_context(engine: Engine) -> None:
    prompt = tuple(range(4, 124))
    one = run(engine, request("r", prompt, max_tokens=500))[0]
    assert len(one.token_ids) == engine.settings.max_context_tokens - len(prompt)
    assert one.deltas[-1].finish_reason is FinishReason.LENGTH


def test_abort_takes_effect_within_a_step(engine: Engine) -> None:
    """Aborted from inside the third delta: at most one more token is computed."""
    collector = Collector()

    def emit(delta: OutputDelta) -> None:
        collector(delta)
        if delta.completion_tokens == 3 and delta.finish_reason is None:
            engine.abort("r")

    engine.submit(request("r", PROMPT, max_tokens=100), emit)
    last = collector.wait()
    assert last.finish_reason is FinishReason.ABORT
    assert last.completion_tokens == len(collector.token_ids) == 3
    _idle(engine)


def test_a_thousand_aborts_free_everything(engine: Engine, refs: dict[str, AdapterRef]) -> None:
    names = [None, *refs]
    collectors = []
    for i in range(1000):
        name = names[i % len(names)]
        collectors.append(Collector())
        prompt = tuple(4 + (i * j) % 300 for j in range(1, 2 + i % 40))
        engine.submit(
            request(f"r{i}", prompt, refs[name] if name else None, fairness_key=str(i % 7), max_tokens=20),
            collectors[-1],
        )
        if i % 3 or i > 900:
            engine.abort(f"r{i - i % 2}")
            engine.abort(f"r{i}")
    for i in range(1000):
        engine.abort(f"r{i}")
    answers = [collector.wait().finish_reason for collector in collectors]
    assert answers.count(FinishReason.ABORT) > 500
    _idle(engine)
    stats = engine.stats()
    assert stats.requests_aborted + stats.requests_finished == 1000
    assert all(resident.references == 0 for resident in engine._adapters.loaded)
    assert run(engine, request("after", PROMPT))[0].token_ids


def test_abort_of_unknown_or_finished_request_is_ignored(engine: Engine) -> None:
    engine.abort("unknown")
    run(engine, request("r"))
    engine.abort("r")
    run(engine, request("r"))
    assert engine.stats().requests_aborted == 0


def test_request_aborted_after_its_deadline(engine: Engine) -> None:
    answers = run(engine, *(request(f"r{i}", time_to_live_s=0.0, max_tokens=100) for i in range(20)))
    assert {answer.deltas[-1].finish_reason for answer in answers} == {FinishReason.ABORT}
    _idle(engine)


def test_extend_moves_the_deadline(engine: Engine) -> None:
    """Extended into the past and the request ends; into the future and it outlives its first deadline."""
    collector = Collector()
    started = threading.Event()

    def emit(delta: OutputDelta) -> None:
        started.set()
        collector(delta)

    engine.submit(request("long", PROMPT, time_to_live_s=60, max_tokens=120), emit)
    assert started.wait(10)
    engine.extend({"long": -1.0, "unknown": 5.0})
    assert collector.wait().finish_reason is FinishReason.ABORT

    kept = Collector()
    engine.submit(request("kept", PROMPT, time_to_live_s=0.05, max_tokens=100), kept)
    engine.extend({"kept": 30.0})
    assert kept.wait().finish_reason is FinishReason.LENGTH


def test_overloaded_when_queue_full(start: Callable[[EngineSettings], Engine], settings: EngineSettings) -> None:
    engine = start(replace(settings, max_running=2, max_queued=3))
    collectors = [Collector() for _ in range(5)]
    for i, collector in enumerate(collectors):
        engine.submit(request(f"r{i}", max_tokens=100), collector)
    assert engine.stats().queued_tokens > 0
    with pytest.raises(Overloaded):
        engine.submit(request("more"), Collector())
    for i in range(5):
        engine.abort(f"r{i}")
    for collector in collectors:
        collector.wait()
    run(engine, request("more"))


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ((), "empty"),
        (tuple(range(4, 132)), "128 tokens"),
        ((5, VOCABULARY), "the model's tokens are 0 to 319"),
        ((-1,), "the model's tokens are 0 to 319"),
    ],
)
def test_invalid_prompt_is_rejected(engine: Engine, prompt: tuple[int, ...], reason: str) -> None:
    with pytest.raises(RequestRejected, match=reason):
        engine.submit(request("r", prompt), Collector())
    _idle(engine)


def test_request_id_in_use_is_rejected(engine: Engine) -> None:
    first = Collector()
    engine.submit(request("r", max_tokens=100), first)
    with pytest.raises(RequestRejected, match="already running"):
        engine.submit(request("r"), Collector())
    engine.abort("r")
    first.wait()
    run(engine, request("r"))


def test_adapter_with_infinite_weights_fails_its_own_requests_alone(
    engine: Engine, refs: dict[str, AdapterRef]
) -> None:
    """Its weights become infinite in their slot, as an overflow would make them; all share steps and memory."""
    healthy = [request("base", PROMPT, max_tokens=30), request("good", PROMPT, refs["all8"], max_tokens=30)]
    expected = [one.token_ids for one in run(engine, *healthy)]
    run(engine, request("warm", PROMPT, refs["mlp3"]))
    slot = next(r.slot for r in engine._adapters.loaded if r.ref.name == "mlp3")
    for b in engine._model.lora._b.values():
        b[slot].fill_(float("inf"))
    ill = [request(f"ill{i}", (9 + i, *PROMPT), refs["mlp3"]) for i in range(3)]
    answers = run(engine, ill[0], healthy[0], ill[1], healthy[1], ill[2])
    for i in (0, 2, 4):
        assert answers[i].deltas[-1].finish_reason is FinishReason.ERROR
        assert "mlp3" in answers[i].deltas[-1].error
    assert [answers[1].token_ids, answers[3].token_ids] == expected
    again = run(engine, *(replace(one, request_id=f"{one.request_id}{i}") for i in range(6) for one in healthy))
    assert all(answer.token_ids in expected for answer in again), "no NaN stays in the KV cache"


def test_prefix_cache_is_per_key_and_adapter(engine: Engine, refs: dict[str, AdapterRef]) -> None:
    prompt = tuple(range(20, 60))

    def cached(name: str, key: str, adapter: AdapterRef | None = None) -> tuple[int, tuple[int, ...]]:
        one = run(engine, request(name, prompt, adapter, fairness_key=key))[0]
        return one.deltas[-1].cached_tokens, one.token_ids

    fresh, expected = cached("1", "a")
    assert fresh == 0
    assert cached("2", "a") == (39, expected)
    assert cached("3", "b") == (0, expected)
    assert cached("4", "a", refs["all8"])[0] == 0
    assert cached("5", "a", refs["all8"])[0] == 39
    assert engine.stats().cached_tokens == 78


def test_pinned_adapter_is_loaded_before_any_request(engine: Engine, refs: dict[str, AdapterRef]) -> None:
    pinned = refs["all8"]
    engine.pin([pinned])
    for name in ("mlp3", "mixed", "attention4", "rslora16"):
        run(engine, request(name, adapter=refs[name]))
    assert f"all8@{pinned.digest}" in engine.stats().adapters_resident


def test_two_digests_of_one_name_run_side_by_side(engine: Engine, refs: dict[str, AdapterRef]) -> None:
    """The name is for people: two digests under one name are two adapters, side by side in one batch."""
    old, new = replace(refs["all8"], name="pirate"), replace(refs["mlp3"], name="pirate")
    expected = [one.token_ids for one in run(engine, request("1", PROMPT, old), request("2", PROMPT, new))]
    running = Collector()
    engine.submit(request("long", PROMPT, old, max_tokens=100), running)
    answers = run(engine, *(request(f"r{i}", PROMPT, [old, new][i % 2]) for i in range(6)))
    assert [answer.token_ids for answer in answers] == expected * 3
    assert running.wait().completion_tokens == 100
    assert running.token_ids[:8] == expected[0]
    assert {one.digest for one in engine.stats().adapters if one.name == "pirate"} == {old.digest, new.digest}


def test_stats_report_tier_and_requests_of_each_adapter(engine: Engine, refs: dict[str, AdapterRef]) -> None:
    engine.pin([refs["all8"]])
    run(engine, *(request(name, PROMPT, ref) for name, ref in refs.items()))
    stats = engine.stats()
    adapters = {one.name: one for one in stats.adapters}
    assert adapters.keys() == refs.keys()
    assert sorted(one.tier for one in adapters.values()) == ["host"] * 3 + ["slot"] * 3
    assert [name for name, one in adapters.items() if one.pinned] == ["all8"]
    assert stats.adapter_disk_loads == len(refs) <= stats.adapter_loads  # one may make way before its request began
    assert stats.adapter_host_bytes > 0
    assert stats.adapter_requests == len(refs)
    run(engine, request("again", PROMPT, refs["all8"]))
    assert engine.stats().adapter_hits == stats.adapter_hits + 1


def test_preempted_requests_get_the_same_tokens(
    start: Callable[[EngineSettings], Engine], settings: EngineSettings, refs: dict[str, AdapterRef]
) -> None:
    engine = start(replace(settings, max_running=3, preempt_after_s=0.0))
    prompts = [(20 + i, *PROMPT) for i in range(3)]
    expected = [run(engine, request("r", prompt, refs["all8"], max_tokens=100))[0].token_ids for prompt in prompts]
    flood = [Collector() for _ in prompts]
    for i, (prompt, collector) in enumerate(zip(prompts, flood, strict=True)):
        engine.submit(request(f"a{i}", prompt, refs["all8"], fairness_key="a", max_tokens=100), collector)
    while engine.stats().running < 3:
        time.sleep(0.001)
    run(engine, request("b", PROMPT, fairness_key="b"))
    for collector in flood:
        collector.wait()
    assert engine.stats().preemptions >= 1
    assert [collector.token_ids for collector in flood] == expected
    assert [collector.deltas[-1].cached_tokens for collector in flood] == [
        collector.deltas[0].cached_tokens for collector in flood
    ]


def test_closed_receiver_aborts_only_its_request(engine: Engine) -> None:
    def gone(delta: OutputDelta) -> None:
        raise RuntimeError("Event loop is closed")

    engine.submit(request("gone", max_tokens=100), gone)
    assert run(engine, request("r", max_tokens=30))[0].deltas[-1].finish_reason is FinishReason.LENGTH
    _idle(engine)


async def test_generate_yields_until_the_last_delta(engine: Engine) -> None:
    deltas = [delta async for delta in engine.generate(request("r", PROMPT, max_tokens=10))]
    assert deltas[-1].finish_reason is FinishReason.LENGTH
    assert sum(len(delta.token_ids) for delta in deltas) == 10


async def test_closing_generate_aborts_the_request(engine: Engine) -> None:
    stream = engine.generate(request("r", PROMPT, max_tokens=120))
    async for _ in stream:
        break
    await stream.aclose()  # type: ignore[attr-defined]
    await asyncio.to_thread(run, engine, request("next"))
    assert engine.stats().requests_aborted == 1


def test_stop_ends_every_request(settings: EngineSettings) -> None:
    engine = Engine(settings)
    engine.start()
    collectors = [Collector() for _ in range(20)]
    for i, collector in enumerate(collectors):
        engine.submit(request(f"r{i}", max_tokens=100), collector)
    engine.stop()
    assert {collector.wait(0).finish_reason for collector in collectors} <= {FinishReason.ABORT, FinishReason.LENGTH}
    with pytest.raises(EngineFailed, match="stopping"):
        engine.submit(request("late"), Collector())
    _idle(engine)


def test_engine_that_never_started_stops(settings: EngineSettings) -> None:
    Engine(settings).stop()


def test_engine_failure_ends_every_request(
    start: Callable[[EngineSettings], Engine], settings: EngineSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start(settings)
    engine.check()

    def broken(spans: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(engine._model, "forward", broken)
    answers = run(engine, *(request(f"r{i}") for i in range(1)))
    assert answers[0].deltas[-1].finish_reason is FinishReason.ERROR
    assert "out of memory" in answers[0].deltas[-1].error
    engine._thread.join(5)
    with pytest.raises(EngineFailed, match="out of memory"):
        engine.check()
    with pytest.raises(EngineFailed):
        engine.submit(request("late"), Collector())


def test_loading_an_adapter_does_not_stall_other_requests(
    engine: Engine, refs: dict[str, AdapterRef], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A load that lasts until another request is done lets that request be done."""
    from deployments.inference.native import loader

    proceed = threading.Event()
    read = loader.read_adapter

    def slow(path: Path, **options: object) -> object:
        assert proceed.wait(30)
        return read(path, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(loader, "read_adapter", slow)
    waiting = Collector()
    engine.submit(request("waits", PROMPT, refs["all8"]), waiting)
    assert run(engine, request("r", PROMPT, max_tokens=50))[0].deltas[-1].completion_tokens == 50
    assert not waiting.deltas
    proceed.set()
    assert waiting.wait().finish_reason is FinishReason.LENGTH
