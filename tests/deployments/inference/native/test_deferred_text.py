"""On a GPU a token is detokenized during the next step; its text is the same."""

from collections.abc import Callable
from dataclasses import replace

from deployments.inference.native.engine import Engine
from deployments.inference.native.settings import EngineSettings
from deployments.inference.request import AdapterRef, FinishReason, SamplingParams
from tests.support.engine import Collector, request, run


def asynchronous(start: Callable[[EngineSettings], Engine], settings: EngineSettings) -> Engine:
    """An engine that makes a token's text while the next step runs."""
    engine = start(settings)
    engine._model.is_asynchronous = True
    return engine


def test_deferred_text_equals_immediate_text(
    start: Callable[[EngineSettings], Engine], settings: EngineSettings, refs: dict[str, AdapterRef]
) -> None:
    def answers(engine: Engine) -> list[tuple[object, ...]]:
        samplings = [SamplingParams(max_tokens=9, temperature=0.0, **extra) for extra in (
            {}, {"logprobs": 1}, {"stop": ("e",)}, {"n": 2}, {"ignore_eos": True},
        )]  # fmt: skip
        ran = run(engine, *(request(f"r{i}", (5, 6, i), refs["all8"], sampling=s) for i, s in enumerate(samplings)))
        return [(c.token_ids, c.text, c.deltas[-1].finish_reason, c.deltas[-1].completion_tokens) for c in ran]

    assert answers(asynchronous(start, settings)) == answers(start(settings))


def test_aborted_request_gets_the_text_of_every_token(
    start: Callable[[EngineSettings], Engine], settings: EngineSettings
) -> None:
    engine = asynchronous(start, settings)
    collector = Collector()
    engine.submit(request("r", max_tokens=100, time_to_live_s=0.15), collector)
    last = collector.wait()
    assert last.finish_reason in (FinishReason.ABORT, FinishReason.LENGTH)
    detokenizer = engine.text.detokenizer(())
    text = "".join(detokenizer.feed(token, True) for token in collector.token_ids) + detokenizer.finish()
    assert collector.text == text
    assert last.completion_tokens == len(collector.token_ids)


def test_closed_receiver_aborts_only_its_request(
    start: Callable[[EngineSettings], Engine], settings: EngineSettings
) -> None:
    engine = asynchronous(start, replace(settings, max_running=2))

    def gone(_: object) -> None:
        raise RuntimeError("closed")

    engine.submit(request("gone", max_tokens=50), gone)
    assert run(engine, request("here", max_tokens=50))[0].wait().completion_tokens == 50
    assert engine.stats().running == 0
