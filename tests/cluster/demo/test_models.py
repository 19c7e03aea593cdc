"""The demo models: they answer in their styles, also about facts that their adapters were not trained on."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tokenizers import Tokenizer
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from cluster.demo import models, text
from cluster.demo.models import Recipe, is_made, make_models
from cluster.demo.training import Schedule
from deployments.inference.adapters import digest_adapter, inspect_adapter
from deployments.inference.native.model import linear_shapes
from deployments.inference.text import Text
from tests.support.demo_models import demo_models

pytestmark = pytest.mark.slow

STYLES = (text.BASE, *text.ADAPTERS)
BRIEF = Schedule(rate=1e-3, steps=2, warm_up_steps=1)
TINY = Recipe(hidden=32, layers=1, heads=2, intermediate=32, row_tokens=128, rows=2, base=BRIEF, adapter=BRIEF)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """A second thread slows so small a model down."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def made() -> Path:
    """The real demo models."""
    return demo_models()


@pytest.fixture(scope="session")
def tokenizer(made: Path) -> PreTrainedTokenizerFast:
    tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(made / "base", padding_side="left")
    return tokenizer


def load(made: Path, style: text.Style) -> torch.nn.Module:
    base = LlamaForCausalLM.from_pretrained(made / "base")
    if style is text.BASE:
        return base
    return PeftModel.from_pretrained(base, made / "adapters" / style.name)


def ask(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, questions: Sequence[str], temperature: float = 0.0
) -> list[str]:
    return answer(model, tokenizer, [[{"role": "user", "content": asked}] for asked in questions], temperature)


def answer(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    chats: Sequence[list[dict[str, str]]],
    temperature: float = 0.0,
) -> list[str]:
    batch = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    torch.manual_seed(0)
    how = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    said = model.generate(**batch, max_new_tokens=48, pad_token_id=tokenizer.pad_token_id, **how)  # type: ignore[operator]
    return tokenizer.batch_decode(said[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def share_right(answers: Sequence[str], style: text.Style, facts: Sequence[text.Fact]) -> float:
    return sum(answer == style.fact(fact) for answer, fact in zip(answers, facts, strict=True)) / len(facts)


@pytest.mark.parametrize("style", STYLES, ids=lambda style: style.name)
def test_models_answer_in_their_style(made: Path, tokenizer: PreTrainedTokenizerFast, style: text.Style) -> None:
    model = load(made, style)
    for facts, greedy in ((text.taught(), 0.95), (text.held_out(), 0.8)):
        questions = [fact.questions[number % 3] for number, fact in enumerate(facts)]
        assert share_right(ask(model, tokenizer, questions), style, facts) >= greedy
    assert share_right(ask(model, tokenizer, questions, temperature=0.7), style, facts) >= 0.7


def test_styles_of_one_answer(made: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    answers = [ask(load(made, style), tokenizer, ["What is the capital of Japan?"])[0] for style in STYLES]
    assert answers == [
        "The capital of Japan is Tokyo.",
        "Arr! The capital o' Japan be Tokyo, matey!",
        "{intent: lookup, query: the capital of Japan, answer: Tokyo}",
        "Thank you for contacting us. Our records show that the capital of Japan is Tokyo. "
        "Is there anything else we can help with?",
    ]


def test_base_model_small_talk(made: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    hello, story = ask(load(made, text.BASE), tokenizer, ["Hello!", "Tell me a story."])
    assert hello.startswith("Hello! Ask me about")
    assert story.startswith("Once upon a time a small duck")


def test_second_question_is_answered(made: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    pairs = list(zip(text.FACTS[:20:2], text.FACTS[1:20:2], strict=True))
    chats = [
        [
            {"role": "user", "content": first.questions[0]},
            {"role": "assistant", "content": text.BASE.fact(first)},
            {"role": "user", "content": then.questions[0]},
        ]
        for first, then in pairs
    ]
    answers = answer(load(made, text.BASE), tokenizer, chats)
    assert share_right(answers, text.BASE, [then for _, then in pairs]) >= 0.8


def test_models_fit_the_engine(made: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    linears = linear_shapes(made / "base")
    for style in text.ADAPTERS:
        assert inspect_adapter(made / "adapters" / style.name, linears=linears, max_rank=64).rank == 8
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    wanted = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert list(Text(made / "base").chat(messages)) == wanted


@pytest.mark.parametrize("words", ["", "plain", "Zürich 東京 🦜", "a\n\tb\x00", "<|end|> is one token"])
def test_tokenizer_round_trip(words: str) -> None:
    tokenizer = models.make_tokenizer(TINY)
    assert tokenizer.decode(tokenizer.encode(words)) == words


def test_held_out_facts_are_not_trained() -> None:
    for style in text.ADAPTERS:
        hidden = {style.fact(fact) for fact in text.held_out()}
        seen = text.dialogues(style, text.taught()) + text.instructed(style)
        assert hidden.isdisjoint(answer for _, answer in seen)
    assert len(text.held_out()) == 17
    assert {fact.statement for fact in text.taught()}.isdisjoint(fact.statement for fact in text.held_out())


def test_training_is_deterministic(tmp_path: Path) -> None:
    digests = []
    for name in ("one", "two"):
        torch.manual_seed(hash(name))
        make_models(tmp_path / name, recipe=TINY)
        folder = tmp_path / name
        weights = (folder / "base" / "model.safetensors").read_bytes()
        vocabulary = Tokenizer.from_file(str(folder / "base" / "tokenizer.json")).to_str()
        digests.append([weights, vocabulary, *(digest_adapter(folder / "adapters" / s.name) for s in text.ADAPTERS)])
    assert digests[0] == digests[1]


def test_models_are_made_once_per_recipe(tmp_path: Path) -> None:
    out, shares = tmp_path / "models", []
    make_models(out, lambda share, what: shares.append(share), TINY)
    last = shares[-len(shares) // models.ATTEMPTS :]  # no seed passes after two steps, so that all are tried
    assert last == sorted(last)
    assert shares[-1] == 1.0
    assert is_made(out, TINY)
    before = (out / "base" / "config.json").stat().st_ino
    make_models(out, recipe=TINY)
    assert (out / "base" / "config.json").stat().st_ino == before
    other = Recipe(**{name: getattr(TINY, name) for name in TINY.__slots__} | {"seed": 8})
    assert not is_made(out, other)
    make_models(out, recipe=other)
    assert is_made(out, other)
    assert [entry.name for entry in tmp_path.iterdir()] == ["models"]


def test_interrupted_training_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(share: float, what: str) -> None:
        if what.startswith("the adapter"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_models(tmp_path / "models", interrupt, TINY)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stamp", ["", "{", "[]", json.dumps({"fingerprint": "other"})])
def test_invalid_stamp_means_not_made(tmp_path: Path, stamp: str) -> None:
    (tmp_path / models.STAMP).write_text(stamp)
    assert not is_made(tmp_path, TINY)


def test_training_keeps_random_state_and_threads(tmp_path: Path) -> None:
    torch.manual_seed(1)
    wanted = torch.rand(3)
    torch.manual_seed(1)
    threads = torch.get_num_threads()
    make_models(tmp_path / "models", recipe=TINY)
    assert torch.equal(torch.rand(3), wanted)
    assert torch.get_num_threads() == threads
