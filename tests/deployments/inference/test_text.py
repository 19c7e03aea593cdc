"""Incremental detokenization equals decoding, characters stay whole, stop strings are found; chat templates."""

import json
import random
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.inference.request import ModelRejected, RequestRejected
from deployments.inference.text import StopStrings, Text
from tests.support.models import VOCABULARY

WORDS = "größer 東京 🙂👩‍👩‍👧 the quick brown fox"


@pytest.fixture(scope="module")
def text(base_path: Path) -> Text:
    return Text(base_path)


def _texts(text: Text, token_ids: list[int], stop: tuple[str, ...] = ()) -> list[str]:
    detokenizer = text.detokenizer(stop)
    texts = [detokenizer.feed(token) for token in token_ids if not detokenizer.stopped]
    return [*texts, detokenizer.finish()]


def test_decode_inverts_encode(text: Text) -> None:
    assert text.decode(text.encode(WORDS)) == WORDS


def test_text_never_ends_in_an_incomplete_character(text: Text) -> None:
    token_ids = list(text.encode(WORDS))
    assert len(text.encode("🙂")) == 4, "a character takes several tokens"
    texts = _texts(text, token_ids)
    assert "\ufffd" not in "".join(texts)
    assert "".join(texts) == WORDS


def test_texts_of_any_tokens_join_to_the_decoded_whole(text: Text) -> None:
    rng = random.Random(3)
    for _ in range(200):
        token_ids = [rng.randrange(VOCABULARY) for _ in range(rng.randrange(1, 60))]
        assert "".join(_texts(text, token_ids)) == text.decode(token_ids)


def test_broken_bytes_are_not_held_back_for_ever(text: Text) -> None:
    lone = next(i for i in range(VOCABULARY) if text.decode([i]) == "\ufffd")
    detokenizer = text.detokenizer()
    assert "".join(detokenizer.feed(lone) for _ in range(100))


def test_incomplete_character_is_replaced_at_the_end(text: Text) -> None:
    smile = list(text.encode("🙂"))
    assert "".join(_texts(text, smile[:-1])) == text.decode(smile[:-1])


@pytest.mark.parametrize("stop", ["quick", "k b", "東京", "🙂", "n fox", "größer"])
def test_stop_string_across_tokens_ends_the_text(text: Text, stop: str) -> None:
    texts = _texts(text, list(text.encode(WORDS)), (stop, "never there"))
    assert "".join(texts) == WORDS[: WORDS.index(stop)]


@given(
    st.text(alphabet="ab", max_size=30),
    st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(1, 5), max_size=30),
)
def test_stop_strings_match_however_the_text_is_split(whole: str, stops: list[str], sizes: list[int]) -> None:
    finder = StopStrings(tuple(stops))
    shown, start = "", 0
    for size in [*sizes, len(whole)]:
        shown += finder.feed(whole[start : start + size])
        start += size
        if finder.hit:
            break
        assert not any(stop in shown for stop in stops)
    shown += finder.finish()
    seen = whole[:start]
    assert finder.hit == any(stop in seen for stop in stops)
    assert shown == seen[: min((seen.index(stop) for stop in stops if stop in seen), default=len(seen))]


def test_only_the_start_of_a_stop_string_is_held_back() -> None:
    finder = StopStrings(("###",))
    assert finder.feed("a#") == "a"
    assert finder.feed("#b") == "##b"
    assert finder.feed("##") == ""
    assert finder.finish() == "##"


def test_chat_is_rendered_by_the_models_template(text: Text) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi {{ 7 * 7 }}"}]
    assert text.render(messages) == "<|system|>Be brief.<|user|>Hi {{ 7 * 7 }}<|assistant|>"
    assert text.chat(messages) == text.encode(text.render(messages))


def test_messages_rejected_by_the_template(text: Text) -> None:
    with pytest.raises(RequestRejected, match="unknown role pirate"):
        text.chat([{"role": "pirate", "content": "Arr"}])


def test_hostile_template_stays_in_its_sandbox(base_path: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(base_path, tmp_path / "model")
    (folder / "chat_template.jinja").write_text("{{ messages.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(RequestRejected):
        Text(folder).chat([{"role": "user", "content": "x"}])


def test_model_without_template_completes_text(base_path: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(base_path, tmp_path / "model")
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    bare = Text(folder)
    assert bare.encode("the fox")
    with pytest.raises(RequestRejected, match="no chat template"):
        bare.chat([{"role": "user", "content": "x"}])


def test_end_tokens_are_read_from_every_file(base_path: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(base_path, tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 3]}))
    assert Text(folder).eos_token_ids == {0, 2, 3}


def test_folder_without_tokenizer_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(ModelRejected, match=r"tokenizer\.json"):
        Text(tmp_path)
