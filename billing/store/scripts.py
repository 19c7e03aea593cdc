"""The Lua scripts by feature and name, each with what it builds on in front."""

from functools import cache
from pathlib import Path

_FEATURES = Path(__file__).parent.parent
_BUILDS_ON = {
    "ledger/hold": ("ledger/caps", "ledger/draw"),
    "ledger/extend": ("ledger/caps", "ledger/draw"),
    "ledger/settle": ("ledger/caps", "ledger/close"),
    "ledger/expire": ("ledger/caps", "ledger/close"),
    "ledger/orphan": ("ledger/caps", "ledger/close"),
    "ledger/claim": ("ledger/outcome",),
    "ledger/conclude": ("ledger/outcome",),
}


def path(name: str) -> Path:
    """Where a script lies: ``ledger/hold`` is ``billing/ledger/lua/hold.lua``."""
    feature, script = name.split("/")
    return _FEATURES / feature / "lua" / f"{script}.lua"


@cache
def source(name: str) -> str:
    """The whole text of one script. A script's SHA-1 is its name in the store: equal text is loaded once."""
    return "\n".join(path(part).read_text() for part in ("store/common", *_BUILDS_ON.get(name, ()), name))
