"""Options of a request: several choices, log-probabilities, logit biases, ``min_tokens``."""

from collections.abc import Callable
from dataclasses import replace
from math import exp

import pytest
import torch

from deployments.inference.native.engine import Engine
from deployments.inference.native.settings import EngineSettings
from deployments.inference.request import AdapterRef, FinishReason, RequestRejected, SamplingParams
from tests.support.engine import Collector, request, run
from tests.support.models import Oracle

PROMPT = (5, 6, 7, 8, 9, 10, 11, 12, 13, 14)
GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
DRAWN = SamplingParams(max_tokens=12, temperature=1.0, seed=7, ignore_eos=True)


def _texts(collector: Collector) -> dict[int, str]:
    texts: dict[int, str] = {}
    for delta in collector.deltas:
        for choice in delta.as_choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
    return texts


def _reasons(collector: Collector) -> dict[int, FinishReason]:
    return {
        choice.index: choice.finish_reason
        for delta in collector.deltas
        for choice in delta.as_choices
        if choice.finish_reason is not None
    }


def test_choices_differ_and_are_counted_together(engine: Engine) -> None:
    one = run(engine, request("r", PROMPT, sampling=replace(DRAWN, n=4)))[0]
    last = one.deltas[-1]
    assert len(set(_texts(one).values())) == 4
    assert (last.prompt_tokens, last.completion_tokens, len(one.token_ids)) == (10, 48, 48)
    assert _reasons(one) == dict.fromkeys(range(4), FinishReason.LENGTH)
    assert [delta.finish_reason for delta in one.deltas].count(FinishReason.LENGTH) == 1
    assert last.cached_tokens == 0, "the shared prompt of the choices is not a prefix cache hit"
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.kv_blocks_used, stats.requests_finished) == (0, 0, 0, 1)


def test_prompt_of_several_choices_is_computed_once(engine: Engine) -> None:
    run(engine, request("r", PROMPT, sampling=replace(DRAWN, n=4)))
    assert engine.stats().prompt_tokens == len(PROMPT) + 3


def test_first_choice_equals_the_single_choice_of_its_seed(engine: Engine, refs: dict[str, AdapterRef]) -> None:
    ref = refs["all8"]
    alone = run(engine, request("r", PROMPT, ref, sampling=DRAWN))[0]
    several = replace(DRAWN, n=3)
    many, again = run(engine, *(request(name, PROMPT, ref, sampling=several) for name in "ab"))
    assert _texts(many) == _texts(again)
    assert _texts(many)[0] == alone.text


def test_request_ends_with_its_last_choice(engine: Engine) -> None:
    sampling = replace(DRAWN, n=6, max_tokens=40, temperature=1.5, stop=("a", "e", "t"))
    one = run(engine, request("r", PROMPT, sampling=sampling))[0]
    ends = [i for i, delta in enumerate(one.deltas) for choice in delta.as_choices if choice.finish_reason is not None]
    assert len(ends) == 6
    assert ends[-1] == len(one.deltas) - 1
    assert len(set(ends)) > 1
    assert all(not set("aet") & set(text) for text in _texts(one).values())


def test_abort_ends_all_choices(engine: Engine) -> None:
    collector = Collector()
    engine.submit(request("r", PROMPT, sampling=replace(DRAWN, n=3, max_tokens=100)), collector)
    engine.abort("r")
    assert collector.wait().finish_reason is FinishReason.ABORT
    assert set(_reasons(collector).values()) == {FinishReason.ABORT}
    assert set(_reasons(collector)) == {0, 1, 2}
    run(engine, request("r"))
    assert engine.stats().kv_blocks_used == 0


def test_more_choices_than_may_run_all_finish(
    start: Callable[[EngineSettings], Engine], settings: EngineSettings
) -> None:
    engine = start(replace(settings, max_running=2, prefix_cache=False))
    one = run(engine, request("r", PROMPT, sampling=replace(DRAWN, n=5)))[0]
    assert len(_texts(one)) == 5
    assert one.deltas[-1].completion_tokens == 60


def test_logprobs_match_peft(engine: Engine, refs: dict[str, AdapterRef], oracle: Oracle) -> None:
    """Before penalties and biases, for the adapter's model, as a plain softmax of PEFT's logits gives them."""
    sampling = replace(GREEDY, logprobs=5, presence_penalty=1.5, logit_bias=((9, 3.0),))
    one = run(engine, request("r", PROMPT, refs["all8"], sampling=sampling))[0]
    reported = [logprob for delta in one.deltas for choice in delta.choices for logprob in choice.logprobs]
    assert [logprob.token_id for logprob in reported] == list(one.token_ids)
    oracle.model.set_adapter("all8")
    with torch.inference_mode():
        logits = oracle.model(input_ids=torch.tensor([PROMPT + one.token_ids])).logits[0].log_softmax(-1)
    for position, logprob in enumerate(reported, start=len(PROMPT) - 1):
        best = logits[position].topk(5)
        assert logprob.logprob == pytest.approx(float(logits[position, logprob.token_id]), abs=1e-3)
        assert [token for token, _ in logprob.top] == best.indices.tolist()
        assert [value for _, value in logprob.top] == pytest.approx(best.values.tolist(), abs=1e-3)


def test_logprobs_zero_reports_no_alternatives(engine: Engine) -> None:
    plain, asked = run(engine, request("a", PROMPT), request("b", PROMPT, sampling=replace(DRAWN, logprobs=0)))
    assert not any(delta.choices for delta in plain.deltas)
    reported = [logprob for delta in asked.deltas for choice in delta.choices for logprob in choice.logprobs]
    assert len(reported) == 12
    assert all(logprob.top == () and 0 < exp(logprob.logprob) <= 1 for logprob in reported)


def test_logit_bias_of_100_forces_and_of_minus_100_forbids(engine: Engine) -> None:
    whole = run(engine, request("r", PROMPT, sampling=GREEDY))[0].token_ids
    forced = run(engine, request("r", PROMPT, sampling=replace(GREEDY, logit_bias=((42, 100.0),))))[0]
    assert set(forced.token_ids) == {42}
    without = run(engine, request("r", PROMPT, sampling=replace(GREEDY, logit_bias=((whole[0], -100.0),))))[0]
    assert whole[0] not in without.token_ids


def test_end_token_not_sampled_before_min_tokens(engine: Engine) -> None:
    """A bias makes the end token certain; it is sampled at the first position where it may be."""
    sampling = SamplingParams(max_tokens=20, temperature=0.0, min_tokens=6, logit_bias=((0, 100.0),))
    one = run(engine, request("r", PROMPT, sampling=sampling))[0]
    assert one.token_ids.index(0) == 6
    assert one.deltas[-1].finish_reason is FinishReason.STOP
    at_once = run(engine, request("r", PROMPT, sampling=replace(sampling, min_tokens=0)))[0]
    assert at_once.token_ids == (0,)


def test_stop_string_before_min_tokens_is_text(engine: Engine) -> None:
    whole = run(engine, request("r", PROMPT, sampling=GREEDY))[0]
    stop = next(delta.text for delta in whole.deltas if delta.text.strip())
    for least in (0, 12):
        sampling = replace(GREEDY, stop=(stop,), min_tokens=least)
        one = run(engine, request("r", PROMPT, sampling=sampling))[0]
        ended_early = len(one.token_ids) < 12
        assert ended_early == (least == 0)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"n": 0}, "n must be"),
        ({"n": 17}, "n must be"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
        ({"logit_bias": ((1, 101.0),)}, "logit_bias"),
        ({"logit_bias": ((1, float("nan")),)}, "logit_bias"),
        ({"logit_bias": ((-1, 1.0),)}, "logit_bias"),
        ({"logit_bias": tuple((i, 1.0) for i in range(1025))}, "logit_bias"),
    ],
)
def test_option_out_of_range_is_rejected(wrong: dict[str, int], reason: str) -> None:
    with pytest.raises(RequestRejected, match=reason):
        replace(GREEDY, **wrong)


def test_logit_bias_for_unknown_token_is_rejected(engine: Engine) -> None:
    with pytest.raises(RequestRejected, match="the model's tokens are 0 to 319"):
        engine.submit(request("r", sampling=replace(GREEDY, logit_bias=((320, 1.0),))))


def test_stream_gives_deltas_or_whole_text(settings: EngineSettings, refs: dict[str, AdapterRef]) -> None:
    with Engine(settings) as engine:
        text = engine.submit(request("1", PROMPT, refs["all8"], sampling=GREEDY)).text()
        deltas = list(engine.submit(request("2", PROMPT, refs["all8"], sampling=GREEDY)))
    assert text == "".join(delta.text for delta in deltas)
    assert deltas[-1].finish_reason is FinishReason.LENGTH
