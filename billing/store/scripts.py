"""The Lua scripts by name, each with the shared part it builds on in front.

Knows where the files lie; the scripts say what they do.
"""

from functools import cache
from pathlib import Path

_LUA = Path(__file__).parent / "lua"
_BUILDS_ON = {
    "hold": ("caps", "draw"),
    "extend": ("caps", "draw"),
    "settle": ("caps", "close"),
    "expire": ("caps", "close"),
    "orphan": ("caps", "close"),
    "claim": ("outcome",),
    "conclude": ("outcome",),
}


@cache
def source(name: str) -> str:
    """The whole text of one script. A script's SHA-1 is its name in the store: equal text is loaded once."""
    parts = ["common", *_BUILDS_ON.get(name, ()), name]
    return "\n".join((_LUA / f"{part}.lua").read_text() for part in parts)
