"""The safetensors format, read strictly: which bytes of a file are which matrix.

Knows the format and its limits; knows nothing of adapters, and needs no torch.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeGuard

import numpy as np
from numpy.typing import NDArray

from deployments.inference.request import AdapterRejected

HEADER_BYTES = 16 * 1024 * 1024
DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
EXPONENT_OF_BF16 = 0x7F80
"""All bits of a bfloat16's exponent; set together they mean an infinity or no number."""


@dataclass(frozen=True, slots=True)
class TensorSpan:
    """One tensor of a safetensors file: its type, shape and bytes, counted from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    def as_float32(self, body: memoryview) -> NDArray[np.float32]:
        """The matrix, out of the file's bytes after the header."""
        raw = self._raw(body)
        if self.dtype == "BF16":
            raw = (raw.astype(np.uint32) << 16).view(np.float32)
        return raw.astype(np.float32, copy=False).reshape(self.shape)

    def is_finite(self, body: memoryview) -> bool:
        """No element is an infinity or no number."""
        raw = self._raw(body)
        if self.dtype == "BF16":
            return not ((raw.view(np.uint16) & EXPONENT_OF_BF16) == EXPONENT_OF_BF16).any()
        return bool(np.isfinite(raw).all())

    def is_any(self, body: memoryview) -> bool:
        """Some element is not zero."""
        return bool(self._raw(body).any())

    def _raw(self, body: memoryview) -> NDArray[np.generic]:
        return np.frombuffer(body[self.start : self.end], dtype=DTYPES[self.dtype])


def read_header(header: bytes, body_bytes: int) -> Iterator[tuple[str, TensorSpan]]:
    """The header's tensors; their bytes must fill the body without gap or overlap.

    Raises:
        AdapterRejected: they don't, or the header is not one.
    """
    try:
        content = json.loads(header, object_pairs_hook=once_each)
    except (ValueError, RecursionError) as error:
        raise AdapterRejected(f"the weights are not a safetensors file: {error}") from error
    if not isinstance(content, dict):
        raise AdapterRejected("the weights are not a safetensors file: its header is no object")
    spans = {name: _span(name, entry) for name, entry in content.items() if name != "__metadata__"}
    expected = 0
    for name, span in sorted(spans.items(), key=lambda item: item[1].start):
        if span.start != expected:
            raise AdapterRejected(f"{name}: its bytes do not follow the tensor before it")
        expected = span.end
        yield name, span
    if expected != body_bytes:
        raise AdapterRejected(f"the file has {body_bytes} bytes of weights where its header says {expected}")


def once_each(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object in which no key stands twice: two readers could take different ones. Raises ValueError."""
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a key stands twice in one object")
    return content


def _span(name: str, entry: object) -> TensorSpan:
    if not isinstance(entry, dict):
        raise AdapterRejected(f"{name}: its header entry is no object")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise AdapterRejected(f"{name} has the type {dtype!r}; float32, float16 and bfloat16 are read")
    if not _whole_numbers(shape) or not _whole_numbers(offsets) or len(shape) != 2 or len(offsets) != 2:
        raise AdapterRejected(f"{name} must be a matrix, not of shape {shape!r} at {offsets!r}")
    size = math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize
    if size == 0 or offsets[1] - offsets[0] != size:
        raise AdapterRejected(f"{name} of shape {shape} does not have {offsets[1] - offsets[0]} bytes")
    return TensorSpan(dtype=dtype, shape=tuple(shape), start=offsets[0], end=offsets[1])


def _whole_numbers(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**48 for item in value)
