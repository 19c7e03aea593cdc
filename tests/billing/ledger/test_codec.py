"""Commands are packed by hiredis, byte for byte as redis-py packs them."""

import pytest
from redis.asyncio.connection import Connection

from billing.store.primary import PrimaryConnection

COMMANDS: list[tuple[object, ...]] = [
    ("PING",),
    (b"PING",),
    ("CONFIG GET", "appendfsync"),
    ("EVALSHA", "0" * 40, 2, "fb:{s01}:holds", "fb:{s01}:leases", "req_1", "", -1, 9_007_199_254_740_993),
    ("SET", "key", "Füller\n\r\n€ 😀"),
    ("SET", "key", b"\x00\xff\r\n"),
    ("ZADD", "key", 0.1, "a", 1e21, "b", -2.5, "c"),
    ("SET", "key", "x" * 100_000),
]


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: str(words[0]))
def test_a_command_is_written_as_the_client_itself_would_write_it(words: tuple[object, ...]) -> None:
    assert b"".join(PrimaryConnection().pack_command(*words)) == b"".join(Connection().pack_command(*words))
