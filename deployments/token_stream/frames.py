"""The protocol between a replica and a gateway: a handshake, then output deltas one way and deadlines the other.

A frame is its length in four bytes, big-endian, and JSON that is parsed strictly into a ``Batch`` or ``Deadlines``.
"""

import hashlib
import hmac
import secrets
from asyncio import StreamReader
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from deployments.inference.request import OutputDelta

NONCE_BYTES = PROOF_BYTES = SECRET_BYTES = 32
LENGTH_BYTES = 4
MAX_FRAME_BYTES = 4 << 20

Batch = Sequence[tuple[str, OutputDelta]]
"""Deltas of several requests, each with its request id; those of one request are in order."""
Deadlines = Mapping[str, float]
"""Seconds from now, by request id."""
T = TypeVar("T")

_BATCH: TypeAdapter[tuple[tuple[str, OutputDelta], ...]] = TypeAdapter(
    tuple[tuple[str, OutputDelta], ...],
    config=ConfigDict(ser_json_inf_nan="constants"),  # a token may be impossible: its log-probability is -Infinity
)

_DEADLINES: TypeAdapter[dict[str, float]] = TypeAdapter(dict[str, float])


class BadFrame(Exception):
    """The other side sent bytes that are not of this protocol: the connection must be closed."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where a gateway listens for tokens, and the secret that both sides prove they have. Sent in the Serve call."""

    host: str
    port: int
    secret: bytes = field(repr=False)


def new_nonce() -> bytes:
    return secrets.token_bytes(NONCE_BYTES)


def proof(secret: bytes, side: str, nonce: bytes) -> bytes:
    """Proves possession of the secret to the side that chose the nonce; ``side`` keeps a proof from being sent back."""
    return hmac.digest(secret, side.encode() + nonce, hashlib.sha256)


def is_proof(claimed: bytes, secret: bytes, side: str, nonce: bytes) -> bool:
    """Compare in constant time."""
    return hmac.compare_digest(claimed, proof(secret, side, nonce))


def pack(batch: Batch) -> bytes:
    """A batch in as many frames as it needs."""
    body = _BATCH.dump_json(tuple(batch), exclude_defaults=True)
    if len(body) <= MAX_FRAME_BYTES:
        return _frame(body)
    assert len(batch) > 1, "a delta is a few tokens"
    middle = len(batch) // 2
    return pack(batch[:middle]) + pack(batch[middle:])


def pack_deadlines(deadlines: Deadlines) -> bytes:
    return _frame(_DEADLINES.dump_json(dict(deadlines)))


async def read_batch(reader: StreamReader) -> Batch:
    """The next batch. Raises BadFrame, and IncompleteReadError or another OSError at the connection's end."""
    return _parse(_BATCH, await _read(reader))


async def read_deadlines(reader: StreamReader) -> Deadlines:
    """The next deadlines. Raises as ``read_batch``."""
    return _parse(_DEADLINES, await _read(reader))


def _frame(body: bytes) -> bytes:
    assert len(body) <= MAX_FRAME_BYTES, "no gateway has so many requests at once"
    return len(body).to_bytes(LENGTH_BYTES, "big") + body


async def _read(reader: StreamReader) -> bytes:
    length = int.from_bytes(await reader.readexactly(LENGTH_BYTES), "big")
    if not 0 < length <= MAX_FRAME_BYTES:
        raise BadFrame(f"a frame of {length} bytes")
    return await reader.readexactly(length)


def _parse(shape: TypeAdapter[T], body: bytes) -> T:
    try:
        return shape.validate_json(body, strict=True)
    except ValidationError as error:
        raise BadFrame(f"{error.error_count()} errors in a frame of {len(body)} bytes") from error
