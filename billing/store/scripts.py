"""Runs Lua scripts in the store, with keys, arguments and replies by name.

A script is ``billing/<feature>/lua/<name>.lua``, named ``<feature>/<name>``. Comments at its top say what it does and
declare, in the order in which they travel, what goes in and what comes out::

    -- Raise one open hold to a total.
    -- include: store/numbers ledger/waterfall
    -- writes: yes
    -- keys: account buckets holds settled[]
    -- args: id tenant total:nanos least:nanos calendar:ms is_preview:flag caps[window start:ms limit:nanos]
    -- reply: held amount | unknown | insufficient balance available held

A script that ``writes`` to keys with a fence first compares the store's schema (``billing.store.schema``).
``include`` names parts, ``<feature>/lua/lib/<name>.lua``, which may include others; each stands in the text once. The
locals ``keys``, ``id``, ``total`` ... are written by this module. ``nanos``, ``ms`` and ``count`` arrive as numbers, a
``flag`` as a boolean, everything else as text; ``caps[...]`` is a list of tables with these fields, ``ids[]`` a list of
texts. Lists come last. ``reply`` declares a list that begins with a word; a script that returns one number says in
words what that is, after ``returns``. A declaration goes on in lines that are indented further.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import cast

from redis.asyncio import Redis

from billing.store.schema import FENCE, fence_of

_FEATURES = Path(__file__).parent.parent
_DECLARATIONS = ("include", "writes", "keys", "args", "reply", "returns")
_READ_AS = {"": "ARGV[{}]", "flag": 'ARGV[{}] == "1"', **dict.fromkeys(("nanos", "ms", "count"), "tonumber(ARGV[{}])")}
_DECLARED = re.compile(rf"-- ({'|'.join(_DECLARATIONS)}): (.*)")
_NAME = re.compile(r"(?P<name>\w+)(?:(?P<list>\[(?P<fields>[^\]]*)\])|:(?P<kind>\w+))?")

Word = str | int
Argument = Word | Sequence[Word] | Sequence[Sequence[Word]]


@dataclass(frozen=True, slots=True)
class Name:
    """One declared key, argument or part of a reply."""

    name: str
    kind: str = ""
    is_list: bool = False
    fields: tuple["Name", ...] = ()
    """Of each row of a list; none where its rows are single words."""

    @property
    def width(self) -> int:
        """Words in a row of the list."""
        return len(self.fields) or 1


@dataclass(frozen=True, slots=True)
class Header:
    """What a script or a part declares."""

    includes: tuple[str, ...]
    does_write: bool
    keys: tuple[Name, ...]
    args: tuple[Name, ...]
    replies: Mapping[str, tuple[Name, ...]]
    """By its first word, what else a reply has; empty for a script that returns one number."""


@dataclass(frozen=True, slots=True)
class Reply:
    """A list that a script returned: its first word, and the other words by their declared names."""

    state: str
    words: Mapping[str, str]
    rows: Sequence[tuple[str, ...]] = ()
    """Of the list that the reply ends with, where it has one."""

    def __getitem__(self, name: str) -> str:
        return self.words[name]

    def number(self, name: str) -> int:
        return int(self.words[name])


class Script:
    """One script of the store."""

    def __init__(self, redis: Redis, name: str) -> None:
        self._name, self._header = name, header_of(name)
        self._plain = redis.register_script(source(name))
        self._fenced = redis.register_script(FENCE + source(name)) if self._header.does_write else None

    async def reply(self, keys: Mapping[str, str | Sequence[str]], args: Mapping[str, Argument] | None = None) -> Reply:
        """Run it for the list that it declares. Raises TypeError where a name is wrong or missing; nothing is sent."""
        words = cast(Sequence[str], await self._run(keys, args or {}))
        declared = self._header.replies[words[0]]
        single = [name.name for name in declared if not name.is_list]
        rest = words[1 + len(single) :]
        rows = (
            [tuple(rest[i : i + declared[-1].width]) for i in range(0, len(rest), declared[-1].width)] if rest else []
        )
        return Reply(words[0], dict(zip(single, words[1:], strict=False)), rows)

    async def number(self, keys: Mapping[str, str | Sequence[str]], args: Mapping[str, Argument] | None = None) -> int:
        """Run it for the number that it returns. Raises TypeError as ``reply`` does."""
        return int(cast(int, await self._run(keys, args or {})))

    async def _run(self, keys: Mapping[str, str | Sequence[str]], args: Mapping[str, Argument]) -> object:
        names = list(_key_words(self._name, self._header, keys))
        words = list(_arg_words(self._name, self._header, args))
        if self._fenced is not None and (fence := fence_of(names[0])):
            return cast(object, await self._fenced(keys=[*names, fence], args=words))
        return cast(object, await self._plain(keys=names, args=words))


def path(name: str) -> Path:
    """Where a script is: ``ledger/hold`` is ``billing/ledger/lua/hold.lua``, the part ``store/clock`` is in ``lib``."""
    feature, script = name.split("/")
    whole = _FEATURES / feature / "lua" / f"{script}.lua"
    return whole if whole.exists() else whole.parent / "lib" / whole.name


@cache
def source(name: str) -> str:
    """The whole text of one script. A script's SHA-1 is its name in the store: equal text is loaded once."""
    parts = [path(part).read_text() for part in _included(name)]
    return "\n".join([*parts, _locals(header_of(name)), path(name).read_text()])


@cache
def header_of(name: str) -> Header:
    """What the comments at the top of a script or a part declare."""
    declared = dict.fromkeys(_DECLARATIONS, "")
    current = ""
    for line in path(name).read_text().splitlines():
        if found := _DECLARED.fullmatch(line):
            current, declared[found[1]] = found[1], found[2]
        elif current and line.startswith("--   "):
            declared[current] += line[2:]
        else:
            current = ""
            if not line.startswith("--"):
                break
    replies = [_names(alternative) for alternative in declared["reply"].split("|") if alternative.strip()]
    return Header(
        includes=tuple(declared["include"].split()),
        does_write=declared["writes"] == "yes",
        keys=_names(declared["keys"]),
        args=_names(declared["args"]),
        replies={state.name: rest for state, *others in replies for rest in [tuple(others)]},
    )


def _names(text: str) -> tuple[Name, ...]:
    return tuple(
        Name(found["name"], found["kind"] or "", found["list"] is not None, _names(found["fields"] or ""))
        for found in _NAME.finditer(text)
    )


def _included(name: str) -> list[str]:
    """The parts that a script needs, each behind those that it needs itself."""
    needed: dict[str, None] = {}
    for part in header_of(name).includes:
        needed |= dict.fromkeys([*_included(part), part])
    return list(needed)


def _locals(header: Header) -> str:
    """The Lua that gives keys and arguments their names."""
    return "\n".join([*_key_locals(header), *_arg_locals(header)])


def _key_locals(header: Header) -> Iterator[str]:
    single = [name for name in header.keys if not name.is_list]
    yield "local keys = { " + ", ".join(f"{key.name} = KEYS[{n}]" for n, key in enumerate(single, 1)) + " }"
    for key in header.keys[len(single) :]:
        yield f"keys.{key.name} = {{}}"
        yield f"for i = {len(single) + 1}, #KEYS do keys.{key.name}[i - {len(single)}] = KEYS[i] end"


def _arg_locals(header: Header) -> Iterator[str]:
    single = [arg for arg in header.args if not arg.is_list]
    for number, arg in enumerate(single, 1):
        yield f"local {arg.name} = {_READ_AS[arg.kind].format(number)}"
    lists = header.args[len(single) :]
    if lists:
        yield f"local at_word = {len(single) + 1}"
    for arg in lists:
        fields = [
            f"{field.name} = {_READ_AS[field.kind].format(f'at_word + {n}')}" for n, field in enumerate(arg.fields, 1)
        ]
        row = "{ " + ", ".join(fields) + " }" if fields else "ARGV[at_word + 1]"
        yield f"local {arg.name} = {{}}"
        yield f"for row = 1, tonumber(ARGV[at_word]) do {arg.name}[row], at_word = {row}, at_word + {arg.width} end"
        yield "at_word = at_word + 1"


def _key_words(script: str, header: Header, keys: Mapping[str, str | Sequence[str]]) -> Iterator[str]:
    _check(script, header.keys, keys.keys())
    for key in header.keys:
        given = keys[key.name]
        if isinstance(given, str):
            yield given
        else:
            yield from given


def _arg_words(script: str, header: Header, args: Mapping[str, Argument]) -> Iterator[str]:
    """On the wire a list is its number of rows, then their words."""
    _check(script, header.args, args.keys())
    for arg in header.args:
        given = args[arg.name]
        if isinstance(given, str | int):
            yield _text(given)
            continue
        yield str(len(given))
        for row in given:
            words = (row,) if isinstance(row, str | int) else row
            if len(words) != arg.width:
                raise TypeError(f"script {script}: a row of {arg.name} has {arg.width} words, not {len(words)}")
            yield from map(_text, words)


def _check(script: str, declared: Sequence[Name], given: object) -> None:
    names = {name.name for name in declared}
    if given != names:
        wrong = sorted(names.symmetric_difference(cast(set[str], given)))
        raise TypeError(f"script {script} declares {sorted(names)}: {', '.join(wrong)} is missing or too many")


def _text(word: Word) -> str:
    return str(int(word)) if isinstance(word, bool) else str(word)
