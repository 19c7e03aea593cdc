"""Text to tokens and back: tokenizer, chat template, incremental detokenization, stop strings.

Reads the files of a Hugging Face model folder. Needs no torch, so that a gateway can use it.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Never

from jinja2 import Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel

from deployments.inference.request import ModelRejected, RequestRejected

REPLACEMENT = "\ufffd"
MAX_CHARACTER_TOKENS = 4
"""A UTF-8 character has at most four bytes, hence at most four byte tokens."""
MAX_HELD_TOKENS = 16
"""Tokens held back for an incomplete character, before they are returned as they are."""
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
WORD_MARK = "\u2581"
"""A space in SentencePiece's tokens."""
PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
BYTES = {chr(byte): byte for byte in PRINTABLE} | {
    chr(256 + place): byte for place, byte in enumerate(sorted(set(range(256)) - set(PRINTABLE)))
}
"""The characters that stand for bytes in byte-level tokens (Radford et al., GPT-2, 2019)."""


class Text:
    """One model's tokenizer and chat template. Encoding is thread-safe.

    Raises:
        ModelRejected: the folder has no ``tokenizer.json``, or its template does not parse.
    """

    def __init__(self, model_path: str | Path) -> None:
        folder = Path(model_path)
        if not (folder / "tokenizer.json").is_file():
            raise ModelRejected(f"{folder} has no tokenizer.json: save the model's fast tokenizer there")
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        config = _read_json(folder / "tokenizer_config.json")
        self._special = {name: _special_token(config.get(name)) for name in ("bos_token", "eos_token", "unk_token")}
        self._template = _compile(_chat_template(folder, config))
        self.vocab_size: int = self.tokenizer.get_vocab_size(with_added_tokens=True)
        self.eos_token_ids: frozenset[int] = self._end_tokens(folder)

    def encode(self, text: str) -> tuple[int, ...]:
        """The text's tokens, with the special tokens that the tokenizer adds to a plain text."""
        return tuple(self.tokenizer.encode(text).ids)

    def chat(self, messages: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
        """The conversation's tokens, up to where the assistant's message begins.

        Raises:
            RequestRejected: the model has no chat template, or the template rejects these messages.
        """
        return tuple(self.tokenizer.encode(self.render(messages), add_special_tokens=False).ids)

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The conversation as text, rendered by the chat template. Raises as ``chat``."""
        if self._template is None:
            raise RequestRejected("this model has no chat template: use the completions endpoint")
        try:
            return self._template.render(
                messages=[dict(message) for message in messages], add_generation_prompt=True, **self._special
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise RequestRejected(f"the model's chat template rejects these messages: {error}") from error

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of these tokens, without special tokens."""
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=True)

    def token(self, token_id: int) -> tuple[str, bytes]:
        """One token as text, incomplete characters replaced, and as its exact bytes."""
        raw = self.tokenizer.id_to_token(token_id) or ""
        if byte := BYTE_TOKEN.fullmatch(raw):
            content = bytes.fromhex(byte[1])
        elif WORD_MARK in raw:
            content = raw.replace(WORD_MARK, " ").encode()
        elif isinstance(self.tokenizer.decoder, ByteLevel) and BYTES.keys() >= set(raw):
            content = bytes(BYTES[character] for character in raw)
        else:
            content = self.tokenizer.decode([token_id], skip_special_tokens=False).encode()
        return content.decode(errors="replace"), content

    def detokenizer(self, stop: Iterable[str] = ()) -> "Detokenizer":
        """A detokenizer for one sequence."""
        return Detokenizer(self, tuple(stop))

    def _end_tokens(self, folder: Path) -> frozenset[int]:
        found: set[int] = set()
        for name in ("generation_config.json", "config.json"):
            ids = _read_json(folder / name).get("eos_token_id")
            found.update([ids] if isinstance(ids, int) else ids if isinstance(ids, list) else ())
        token = self._special["eos_token"]
        token_id = self.tokenizer.token_to_id(token) if token else None
        return frozenset(found if token_id is None else found | {token_id})


class Detokenizer:
    """Detokenizes one sequence token by token.

    The texts that it returns join to the decoded whole. None ends in an incomplete character, and none contains any
    part of a stop string.
    """

    def __init__(self, text: Text, stop: tuple[str, ...] = ()) -> None:
        self._text = text
        self._stop = StopStrings(stop)
        self._ids: list[int] = []
        self._context_start = 0
        """Tokens from here to ``_read`` were returned before, and give the next ones their context."""
        self._read = 0

    @property
    def stopped(self) -> bool:
        """A stop string was found; no more text follows."""
        return self._stop.hit

    def feed(self, token_id: int, may_stop: bool = True) -> str:
        """Add a token; return the text that is complete. Unless ``may_stop``, a stop string that ends in it is text."""
        self._ids.append(token_id)
        return self._stop.feed(self._decode_new(final=False), may_stop)

    def finish(self) -> str:
        """The text that was held back, after the last token; empty after a stop string."""
        return self._stop.feed(self._decode_new(final=True)) + self._stop.finish()

    def _decode_new(self, final: bool) -> str:
        end = len(self._ids)
        shown = self._text.decode(self._ids[self._context_start : self._read])
        whole = self._text.decode(self._ids[self._context_start : end])
        if whole.endswith(REPLACEMENT) and not final:
            if end - self._read < MAX_HELD_TOKENS:
                return ""
            end -= MAX_CHARACTER_TOKENS - 1
            whole = self._text.decode(self._ids[self._context_start : end])
        if len(whole) <= len(shown) and not final:
            return ""
        self._context_start, self._read = self._read, end
        return whole[len(shown) :]


class StopStrings:
    """Finds the first of several strings in a text that grows. The start of a possible match is held back."""

    def __init__(self, stop: tuple[str, ...]) -> None:
        self._stop = stop
        self._held = ""
        self.hit = False

    def feed(self, new: str, may_stop: bool = True) -> str:
        """Add text; return what cannot be part of a match. Unless ``may_stop``, a match that ends in it is text."""
        if self.hit:
            return ""
        text = self._held + new
        found = [position for position in map(text.find, self._stop) if position >= 0] if may_stop else []
        if found:
            self.hit, self._held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """The text that was held back, after the last of it."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a proper prefix of ``stop``."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)


def _read_json(path: Path) -> dict[str, object]:
    if not path.is_file():
        return {}
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ModelRejected(f"{path} must hold a JSON object")
    return content


def _special_token(value: object) -> str:
    """A special token: a string, or an object with the string as ``content``."""
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else ""


def _chat_template(folder: Path, config: Mapping[str, object]) -> str | None:
    """The template from its own file, else from the configuration; of several named ones, ``default``."""
    own_file = folder / "chat_template.jinja"
    if own_file.is_file():
        return own_file.read_text(encoding="utf-8")
    value = config.get("chat_template")
    if isinstance(value, list):
        named = {item.get("name"): item.get("template") for item in value if isinstance(item, dict)}
        value = named.get("default")
    return value if isinstance(value, str) else None


def _compile(source: str | None) -> Template | None:
    """Compile a template as transformers does: sandboxed, blocks trimmed, with the functions that templates use."""
    if source is None:
        return None
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    try:
        return environment.from_string(source)
    except TemplateError as error:
        raise ModelRejected(f"the model's chat template does not parse: {error}") from error


def _to_json(value: object, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> Never:
    raise TemplateError(message)


def _strftime_now(layout: str) -> str:
    return datetime.now().astimezone().strftime(layout)
