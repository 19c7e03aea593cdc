"""Read the safetensors format strictly: which bytes of a file are which matrix. Needs no torch."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeGuard

import numpy as np
from numpy.typing import NDArray

from deployments.inference.request import AdapterRejected

MAX_HEADER_BYTES = 16 * 1024 * 1024
DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
EXPONENT_OF_BF16 = 0x7F80
"""The exponent bits of a bfloat16. If all are set, it is infinite or not a number."""


@dataclass(frozen=True, slots=True)
class TensorSpan:
    """One matrix of a safetensors file: its type, shape and range of bytes after the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    def as_float32(self, body: memoryview) -> NDArray[np.float32]:
        """The matrix; ``body`` are the file's bytes after the header."""
        raw = self._raw(body)
        if self.dtype == "BF16":
            raw = (raw.astype(np.uint32) << 16).view(np.float32)
        return raw.astype(np.float32, copy=False).reshape(self.shape)

    def is_finite(self, body: memoryview) -> bool:
        """True if all elements are finite numbers."""
        raw = self._raw(body)
        if self.dtype == "BF16":
            return not ((raw.view(np.uint16) & EXPONENT_OF_BF16) == EXPONENT_OF_BF16).any()
        return bool(np.isfinite(raw).all())

    def is_any(self, body: memoryview) -> bool:
        """True if some element is not zero."""
        return bool(self._raw(body).any())

    def _raw(self, body: memoryview) -> NDArray[np.generic]:
        return np.frombuffer(body[self.start : self.end], dtype=DTYPES[self.dtype])


def read_header(header: bytes, body_bytes: int) -> Iterator[tuple[str, TensorSpan]]:
    """The matrices by name, in the order of their bytes, which must fill the body without gap or overlap.

    Raises:
        AdapterRejected: they don't, or the header is malformed.
    """
    try:
        content = json.loads(header, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise AdapterRejected(f"the weights are not a safetensors file: {error}") from error
    if not isinstance(content, dict):
        raise AdapterRejected("the weights are not a safetensors file: its header is not an object")
    spans = {name: _span(name, entry) for name, entry in content.items() if name != "__metadata__"}
    expected = 0
    for name, span in sorted(spans.items(), key=lambda item: item[1].start):
        if span.start != expected:
            raise AdapterRejected(f"{name}: its bytes do not follow the tensor before it")
        expected = span.end
        yield name, span
    if expected != body_bytes:
        raise AdapterRejected(f"the file has {body_bytes} bytes of weights where its header says {expected}")


def unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Build a JSON object, and raise ValueError if a key occurs twice: another reader could take the other value."""
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a key occurs twice in one object")
    return content


def _span(name: str, entry: object) -> TensorSpan:
    if not isinstance(entry, dict):
        raise AdapterRejected(f"{name}: its header entry is not an object")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise AdapterRejected(f"{name} has the type {dtype!r}; only F32, F16 and BF16 are supported")
    if not _whole_numbers(shape) or not _whole_numbers(offsets) or len(shape) != 2 or len(offsets) != 2:
        raise AdapterRejected(f"{name} must be a matrix, not of shape {shape!r} at {offsets!r}")
    size = math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize
    if size == 0 or offsets[1] - offsets[0] != size:
        raise AdapterRejected(f"{name} of shape {shape} does not have {offsets[1] - offsets[0]} bytes")
    return TensorSpan(dtype=dtype, shape=tuple(shape), start=offsets[0], end=offsets[1])


def _whole_numbers(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**48 for item in value)
