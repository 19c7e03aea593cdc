"""The store that version 0.1 wrote, for tests of its migration. ``record_version_1.py`` says what it holds."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from redis.asyncio import Redis

from billing.clock import now_ms
from billing.ledger.ledger import MARKER_WINDOW_MS
from billing.store.keys import SETTLED_WINDOWS

FILE = Path(__file__).parent.parent / "billing" / "store" / "version_1.jsonl"


def lines(kind: str) -> Iterator[dict[str, Any]]:
    """Lines that have this member: ``key``, ``spool``, ``account`` or ``about``."""
    for text in FILE.read_text().splitlines():
        line = json.loads(text)
        if kind in line:
            yield line


RECORDED_AT_MS: int = next(lines("about"))["recorded_at_ms"]
LOADED_AT_MS = now_ms()
"""The same for all tests of a process, so that each loads the same."""


def spool_lines() -> Iterator[str]:
    """Settlements on disk, whose holds are as old now as they were when they were recorded."""
    for line in lines("spool"):
        settlement = json.loads(line["spool"])
        if "origin" in settlement:
            settlement["origin"]["held_at_ms"] += LOADED_AT_MS - RECORDED_AT_MS
        yield json.dumps(settlement)


async def load(redis: Redis) -> None:
    """Write the recorded keys into an empty store. Lifetimes begin now with what was left of them, and the marks of
    settled requests stand in the hash of now."""
    turn = LOADED_AT_MS // MARKER_WINDOW_MS % SETTLED_WINDOWS
    pipe = redis.pipeline(transaction=False)
    for line in lines("key"):
        key, value = line["key"], line["value"]
        if ":settled:" in key:
            key = f"{key.rpartition(':')[0]}:{turn}"
        match line["type"]:
            case "string":
                pipe.set(key, value)
            case "hash":
                pipe.hset(key, mapping=value)
            case "set":
                pipe.sadd(key, *value)
            case "zset":
                pipe.zadd(key, dict(value))
            case "stream":
                for id_, fields in value:
                    pipe.xadd(key, fields, id=id_)
        if line["ttl_ms"] > 0:
            pipe.pexpire(key, line["ttl_ms"])
    await pipe.execute()


async def contents(redis: Redis) -> dict[str, object]:
    """Every key of the store and what it holds."""
    found: dict[str, object] = {}
    for key in sorted([key async for key in redis.scan_iter(count=1_000)]):
        match await redis.type(key):
            case "string":
                is_sketch = ":sightings:" in key  # no text
                found[key] = await (redis.pfcount(key) if is_sketch else redis.get(key))
            case "hash":
                found[key] = await redis.hgetall(key)
            case "set":
                found[key] = await redis.smembers(key)
            case "zset":
                found[key] = await redis.zrange(key, 0, -1, withscores=True)
            case "stream":
                found[key] = await redis.xrange(key)
    return found
