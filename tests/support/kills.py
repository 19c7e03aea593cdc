"""End a piece of work just before one of its writes, as a kill -9 does."""

import asyncio
from collections.abc import Awaitable

import pytest
from redis.asyncio import Redis

from billing.store import write as writes
from billing.store.scripts import Script

Write = writes.write


async def killed_before(monkeypatch: pytest.MonkeyPatch, number: int, work: Awaitable[object], module: object) -> bool:
    """Do ``work`` until its write of this number, from 0; ``module`` is the one that writes. Was it killed?

    Plain commands and scripts that write count alike.
    """
    done = 0
    run = Script.number

    def count() -> None:
        nonlocal done
        done += 1
        if done > number:
            raise asyncio.CancelledError

    async def write(redis: Redis, *commands: writes.Command) -> list[object]:
        count()
        return await Write(redis, *commands)

    async def number_of(script: Script, *args: object, **named: object) -> int:
        count()
        return await run(script, *args, **named)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(module, "write", write)
        patched.setattr(Script, "number", number_of)
        try:
            await work
        except asyncio.CancelledError:
            return True
    return False
