"""Every script against its header: what is declared is what is there, in both languages."""

import ast
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from redis.asyncio import Redis

from billing.store import scripts
from billing.store.scripts import Script, header_of, path, source

BILLING = Path(scripts.__file__).parent.parent
SCRIPTS = sorted(f"{path.parent.parent.name}/{path.stem}" for path in BILLING.glob("*/lua/*.lua"))
PARTS = sorted(f"{path.parent.parent.parent.name}/{path.stem}" for path in BILLING.glob("*/lua/lib/*.lua"))
GLOBALS = {"redis", "cjson", "string", "table", "math", "tonumber", "ipairs", "pairs", "next", "unpack", "KEYS", "ARGV"}
_DUMP = """
local bytes, hex = string.dump(assert(loadstring(ARGV[1]))), {}
for i = 1, #bytes do hex[i] = string.format("%02x", string.byte(bytes, i)) end
return table.concat(hex)
"""


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_declares_what_it_writes_and_answers(name: str) -> None:
    text = path(name).read_text()
    assert re.match(r"-- [A-Z].*\.\n|-- [A-Z].*[^.:]\n-- ", text), "the first sentence says what it does"
    assert re.search(r"^-- writes: (yes|no)$", text, re.M)
    assert ("-- reply: " in text) != ("-- returns: " in text)


@pytest.mark.parametrize("name", SCRIPTS + PARTS)
def test_every_include_is_used(name: str) -> None:
    body = _without_comments(path(name).read_text())
    for part in header_of(name).includes:
        assert any(re.search(rf"\b{defined}\b", body) for defined in _defines(part)), f"{part} is included for nothing"


@pytest.mark.parametrize("name", SCRIPTS + PARTS)
def test_every_part_that_is_used_is_included(name: str) -> None:
    body = _without_comments(path(name).read_text())
    for part in PARTS:
        if part != name and any(re.search(rf"\b{defined}\(", body) for defined in _defines(part)):
            assert part in header_of(name).includes


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_key_and_argument_is_used(name: str) -> None:
    whole = _without_comments(source(name))
    for key in header_of(name).keys:
        assert len(re.findall(rf"\bkeys\.{key.name}\b", whole)) >= 1 + key.is_list, key.name
    body = _without_comments(path(name).read_text())
    for arg in header_of(name).args:
        assert re.search(rf"\b{arg.name}\b", body), arg.name
        for field in arg.fields:
            assert re.search(rf"\.{field.name}\b", whole), f"{arg.name}.{field.name}"


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_key_that_is_used_is_declared(name: str) -> None:
    parts = [path(name).read_text(), *(path(part).read_text() for part in _all_parts(name))]
    used = set(re.findall(r"\bkeys\.(\w+)", _without_comments("\n".join(parts[:1]))))
    assert used <= {key.name for key in header_of(name).keys}


@pytest.mark.parametrize("name", SCRIPTS)
async def test_script_reads_no_global_and_fits_the_locals_of_a_chunk(name: str, store: Redis) -> None:
    """Compiled by the store's own Lua, which refuses a chunk of more than 200 locals."""
    code = bytes.fromhex(str(await store.eval(_DUMP, 0, source(name))))
    assert set(_globals(code)) <= GLOBALS


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_argument_takes_the_name_of_a_function(name: str) -> None:
    functions = {defined for part in _all_parts(name) for defined in _defines(part)}
    assert not functions & {arg.name for arg in header_of(name).args}


def test_every_call_names_what_its_script_declares() -> None:
    called = list(_calls())
    assert {call.script for call in called} == set(SCRIPTS)
    for call in called:
        header = header_of(call.script)
        assert call.method == ("reply" if header.replies else "number"), call
        for given, declared in ((call.keys, header.keys), (call.args, header.args)):
            assert given is None or given == {name.name for name in declared}, call


@pytest.mark.parametrize(
    ("keys", "args"),
    [
        ({"values": "v"}, {"old": "1", "new": "2"}),
        ({"value": "v"}, {"old": "1"}),
        ({"value": "v"}, {"old": "1", "new": "2", "more": "3"}),
        ({}, {"old": "1", "new": "2"}),
    ],
)
async def test_wrong_name_fails_before_anything_is_sent(
    keys: dict[str, str], args: dict[str, str], store: Redis
) -> None:
    await store.set("v", "1")
    with pytest.raises(TypeError, match="store/swap"):
        await Script(store, "store/swap").number(keys, args)
    assert await store.get("v") == "1"


async def test_row_of_the_wrong_width_fails_before_anything_is_sent(store: Redis) -> None:
    with pytest.raises(TypeError, match="a row of events has 2 words, not 3"):
        await Script(store, "export/mark").number({"outbox": "o"}, {"events": [("a", "b", "c")]})


@dataclass(frozen=True)
class Call:
    """One call of a script; names that are not written out there are ``None``."""

    where: str
    script: str
    method: str
    keys: set[str] | None
    args: set[str] | None


def _calls() -> Iterator[Call]:
    for file in sorted(BILLING.rglob("*.py")):
        tree = ast.parse(file.read_text())
        for cls in (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
            made = dict(_scripts_of(cls))
            for node in ast.walk(cls):
                if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                    continue
                owner = node.func.value
                if node.func.attr in ("reply", "number") and isinstance(owner, ast.Attribute) and owner.attr in made:
                    given = {keyword.arg: _names_in(keyword.value) for keyword in node.keywords}
                    where = f"{file.name}:{node.lineno}"
                    yield Call(where, made[owner.attr], node.func.attr, given.get("keys"), given.get("args"))


def _scripts_of(cls: ast.ClassDef) -> Iterator[tuple[str, str]]:
    for node in ast.walk(cls):
        if (
            isinstance(node, ast.Assign)
            and isinstance(node.value, ast.Call)
            and isinstance(node.targets[0], ast.Attribute)
        ):
            match node.value:
                case ast.Call(func=ast.Name(id="Script"), args=[_, ast.Constant(value=str(name))]):
                    yield node.targets[0].attr, name


def _names_in(value: ast.expr) -> set[str] | None:
    if not isinstance(value, ast.Dict) or None in value.keys:
        return None
    return {key.value for key in value.keys if isinstance(key, ast.Constant) and isinstance(key.value, str)}


def _all_parts(name: str) -> list[str]:
    direct = header_of(name).includes
    return list(dict.fromkeys([*direct, *(part for one in direct for part in _all_parts(one))]))


def _defines(part: str) -> list[str]:
    found = re.findall(r"^local (?:function )?(\w+(?:, \w+)*)", path(part).read_text(), re.M)
    return [name for names in found for name in names.split(", ")]


def _without_comments(text: str) -> str:
    return re.sub(r"--.*", "", text)


def _globals(code: bytes) -> Iterator[str]:
    """Names of the globals that compiled Lua 5.1 reads or writes."""
    yield from _Chunk(code).globals()


class _Chunk:
    """Reads the output of ``string.dump``: a header of 12 bytes, then functions within functions."""

    GET, SET = 5, 7

    def __init__(self, code: bytes) -> None:
        assert code[:12] == b"\x1bLua\x51\x00\x01\x04\x08\x04\x08\x00", "Lua 5.1 of 64 bits"
        self._code, self._at = code, 12

    def globals(self) -> list[str]:
        self._text()
        self._skip(4 + 4 + 4)  # where it is defined; upvalues, parameters, varargs, stack
        instructions = [self._number("I") for _ in range(self._number("i"))]
        constants = [self._constant() for _ in range(self._number("i"))]
        found = [constants[i >> 14] for i in instructions if i & 0x3F in (self.GET, self.SET)]
        for _ in range(self._number("i")):
            found += self.globals()
        self._skip(4 * self._number("i"))
        for _ in range(self._number("i")):
            self._text()
            self._skip(8)
        for _ in range(self._number("i")):
            self._text()
        return found

    def _constant(self) -> str:
        kind = self._number("B")
        if kind == 4:
            return self._text()
        self._skip({0: 0, 1: 1, 3: 8}[kind])
        return ""

    def _text(self) -> str:
        size = self._number("Q")
        text = self._code[self._at : self._at + size]
        self._at += size
        return text[:-1].decode()

    def _number(self, kind: str) -> int:
        (value,) = struct.unpack_from(f"<{kind}", self._code, self._at)
        self._at += struct.calcsize(f"<{kind}")
        return int(value)

    def _skip(self, size: int) -> None:
        self._at += size
