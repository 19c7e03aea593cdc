"""Runs Lua scripts in the store, with keys, arguments and replies by name.

A script is ``billing/<feature>/lua/<name>.lua``, named ``<feature>/<name>``. Comments at its top say what it does and
declare, in the order in which they travel, what goes in and what comes out::

    -- Raise one open hold to a total.
    -- include: store/numbers ledger/waterfall
    -- writes: yes
    -- keys: account buckets holds settled[]
    -- args: id tenant total:nanos least:nanos gateway_now:ms is_preview:flag caps[window start:ms limit:nanos]
    -- reply: held amount | unknown | insufficient balance available held

A script that ``writes`` to keys with a fence first compares the store's schema (``billing.store.schema``).
``include`` names parts, ``<feature>/lua/lib/<name>.lua``, which may include others; what a script uses of them is put
before it. The locals ``keys``, ``id``, ``total`` ... are written by this module. ``nanos``, ``ms`` and ``count`` arrive
as numbers, a ``flag`` as a boolean, everything else as text; ``caps[...]`` is a list of tables with these fields,
``ids[]`` a list of texts. Lists come last. ``reply`` declares a list that begins with a word; a script that returns one
number says in words what that is, after ``returns``. A declaration goes on in lines that are indented further.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeVar, cast

from redis.asyncio import Redis
from redis.exceptions import NoScriptError

from billing.store.schema import FENCE, fence_of

_FEATURES = Path(__file__).parent.parent
_DECLARATIONS = ("include", "writes", "keys", "args", "reply", "returns")
_READ_AS = {"": "ARGV[{}]", "flag": 'ARGV[{}] == "1"', **dict.fromkeys(("nanos", "ms", "count"), "tonumber(ARGV[{}])")}
_DECLARED = re.compile(rf"-- ({'|'.join(_DECLARATIONS)}): (.*)")
_DEFINED = re.compile(r"local (?:function )?(\w+(?:, \w+)*)")
_COMMENT = re.compile(r"--.*")
_NAME = re.compile(r"(?P<name>\w+)(?:(?P<list>\[(?P<fields>[^\]]*)\])|:(?P<kind>\w+))?")

T = TypeVar("T")
Word = str | int
Row = Word | Sequence[Word]
Argument = Word | Sequence[Row]


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
    replies: Mapping[str, tuple[tuple[str, ...], int]]
    """By the first word of a reply, the names of its other words, and the width of the rows that it may end with.
    Empty for a script that returns one number."""


@dataclass(slots=True)
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
        self._redis, self._header = redis, header_of(name)
        self._plain = redis.register_script(source(name))
        self._fenced = redis.register_script(FENCE + source(name)) if self._header.does_write else None
        self._keys, self._args = _Order(name, self._header.keys), _Order(name, self._header.args)

    async def reply(self, keys: Mapping[str, str | Sequence[str]], args: Mapping[str, Argument]) -> Reply:
        """Run it for the list that it declares. Raises TypeError where a name is wrong or missing; nothing is sent."""
        words = cast(Sequence[str], await self._run(keys, args))
        names, width = self._header.replies[words[0]]
        rest = words[1 + len(names) :]
        rows = [tuple(rest[at : at + width]) for at in range(0, len(rest), width)] if rest else []
        return Reply(words[0], dict(zip(names, words[1:], strict=False)), rows)

    async def number(self, keys: Mapping[str, str | Sequence[str]], args: Mapping[str, Argument]) -> int:
        """Run it for the number that it returns. Raises TypeError as ``reply`` does."""
        return int(cast(int, await self._run(keys, args)))

    async def _run(self, keys: Mapping[str, str | Sequence[str]], args: Mapping[str, Argument]) -> object:
        names, script = self._keys.keys(keys), self._plain
        words = self._args.words(args)
        if self._fenced is not None and (fence := fence_of(names[0])):
            names.append(fence)
            script = self._fenced
        try:
            return cast(object, await self._redis.evalsha(script.sha, len(names), *names, *words))
        except NoScriptError:
            return cast(object, await script(keys=names, args=words))  # loads it first


class _Order:
    """The order in which the keys or the arguments of a script travel."""

    def __init__(self, script: str, declared: Sequence[Name]) -> None:
        self._script = script
        self._ordered = [name.name for name in declared]
        self._lists = [name for name in declared if name.is_list]
        self._singles = len(declared) - len(self._lists)
        self._flags = [number for number, name in enumerate(declared) if name.kind == "flag"]

    def keys(self, given: Mapping[str, str | Sequence[str]]) -> list[str]:
        """A list of keys is the last. Raises TypeError where a name is wrong or missing."""
        values = cast(list[str], self._values(given))
        if self._lists:
            values += values.pop()
        return values

    def _values(self, given: Mapping[str, T]) -> list[T]:
        if len(given) == len(self._ordered):
            try:
                return list(map(given.__getitem__, self._ordered))
            except KeyError:
                pass
        wrong = ", ".join(sorted({*self._ordered} ^ given.keys()))
        raise TypeError(f"script {self._script} declares {sorted(self._ordered)}: {wrong} is missing or too many")

    def words(self, given: Mapping[str, Argument]) -> list[Word]:
        """On the wire a list is its number of rows, then their words, and a flag is 1 or 0."""
        words = cast(list[Word], self._values(given))
        lists = cast(list[Sequence[Row]], words[self._singles :])
        del words[self._singles :]
        for flag in self._flags:
            words[flag] = int(words[flag])
        for name, rows in zip(self._lists, lists, strict=True):
            words.append(len(rows))
            for row in rows:
                row_words = (row,) if isinstance(row, str | int) else row
                if len(row_words) != name.width:
                    raise TypeError(
                        f"script {self._script}: a row of {name.name} has {name.width} words, not {len(row_words)}"
                    )
                words += row_words
        return words


def path(name: str) -> Path:
    """Where a script is: ``ledger/hold`` is ``billing/ledger/lua/hold.lua``, the part ``store/clock`` is in ``lib``."""
    feature, script = name.split("/")
    whole = _FEATURES / feature / "lua" / f"{script}.lua"
    return whole if whole.exists() else whole.parent / "lib" / whole.name


@cache
def source(name: str) -> str:
    """The whole text of one script. A script's SHA-1 is its name in the store: equal text is loaded once."""
    parts = "\n".join(path(part).read_text() for part in _included(name))
    body = path(name).read_text()
    return "\n".join([_used(parts, body), _locals(header_of(name)), body])


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
        replies={state.name: _reply(others) for state, *others in replies},
    )


def _reply(names: Sequence[Name]) -> tuple[tuple[str, ...], int]:
    return tuple(name.name for name in names if not name.is_list), names[-1].width if names else 1


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


def _used(parts: str, body: str) -> str:
    """Of all that the parts define, what a script uses, directly or not: a function costs time each time a script runs.

    A definition begins with ``local`` at the start of a line, and can use only those before it.
    """
    used, code = [], _COMMENT.sub("", body)
    for definition in reversed(re.split(r"^(?=local )", parts, flags=re.MULTILINE)[1:]):
        names = cast(re.Match[str], _DEFINED.match(definition))[1].split(", ")
        if any(re.search(rf"\b{name}\b", code) for name in names):
            used.append(definition)
            code += _COMMENT.sub("", definition)
    return "".join(reversed(used))


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
