"""A tokenizer for which every word, known or not, is one token."""

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers

CHAT_TEMPLATE = "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}<assistant>"
SPECIAL = ("<unk>", "<end>", "<user>", "<system>", "<assistant>")


def save_word_tokenizer(folder: Path, words: Iterable[str] = ()) -> None:
    """Save it to an existing folder, with a chat template. Words other than ``words`` have the id of ``<unk>``."""
    vocabulary = {word: number for number, word in enumerate((*SPECIAL, *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>", "chat_template": CHAT_TEMPLATE}))
