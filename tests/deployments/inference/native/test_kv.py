"""KV slots on a CPU: prefix cache hits, and what may not be reused."""

import random

import pytest

from deployments.inference.native.kv import KvSlotAllocator, common_prefix
from deployments.inference.native.sequence import Sequence
from deployments.inference.request import AdapterRef
from tests.support.engine import RecordedRows, request


def _ended(
    kv: KvSlotAllocator, prompt: tuple[int, ...], key: str = "", adapter: str = "", is_valid: bool = True
) -> Sequence:
    ref = AdapterRef(adapter, adapter, "") if adapter else None
    sequence = Sequence(request("r", prompt, ref, fairness_key=key))
    kv.allocate(sequence)
    sequence.computed_tokens = len(prompt)
    sequence.token_ids.append(1)
    kv.free(sequence, is_valid)
    return sequence


LONG = tuple(range(40))


@pytest.mark.parametrize(
    ("prompt", "key", "adapter", "cached"),
    [
        (LONG, "k", "a", 39),
        ((*LONG, 99), "k", "a", 40),
        ((*LONG[:20], 99), "k", "a", 20),
        ((*LONG[:7], 99), "k", "a", 0),
        (LONG, "other", "a", 0),
        (LONG, "k", "other", 0),
        (LONG, "k", "", 0),
    ],
)
def test_prefix_cache_hit_needs_same_key_and_adapter(
    prompt: tuple[int, ...], key: str, adapter: str, cached: int
) -> None:
    kv = KvSlotAllocator(3, RecordedRows(), prefix_cache=True)
    _ended(kv, LONG, "k", "a")
    assert _ended(kv, prompt, key, adapter).cached_tokens == cached


def test_prefix_of_a_running_sequence_is_copied() -> None:
    rows = RecordedRows()
    kv = KvSlotAllocator(3, rows, prefix_cache=True)
    first = Sequence(request("1", LONG))
    kv.allocate(first)
    first.computed_tokens = 25
    second = Sequence(request("2", LONG))
    kv.allocate(second)
    assert second.computed_tokens == 25
    assert rows.copies == [(first.kv_slot, second.kv_slot, 25)]


def test_invalid_slot_is_cleared_and_not_reused() -> None:
    rows = RecordedRows()
    kv = KvSlotAllocator(1, rows, prefix_cache=True)
    _ended(kv, LONG, is_valid=False)
    assert rows.cleared == [0]
    assert _ended(kv, LONG).cached_tokens == 0


def test_shared_prefixes_hit_across_keys_not_adapters() -> None:
    kv = KvSlotAllocator(3, RecordedRows(), prefix_cache=True, shared_prefixes=True)
    _ended(kv, LONG, "k", "a")
    assert _ended(kv, LONG, "other", "a").cached_tokens == 39
    assert _ended(kv, LONG, "other", "b").cached_tokens == 0


def test_no_hit_without_prefix_cache() -> None:
    kv = KvSlotAllocator(1, RecordedRows(), prefix_cache=False)
    _ended(kv, LONG)
    assert _ended(kv, LONG).cached_tokens == 0


def test_common_prefix_is_exact() -> None:
    rng = random.Random(0)
    for _ in range(300):
        left = [rng.randrange(2) for _ in range(rng.randrange(12))]
        right = left[: rng.randrange(12)] + [rng.randrange(2) for _ in range(rng.randrange(5))]
        exact = next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), None)
        assert common_prefix(left, right) == (min(len(left), len(right)) if exact is None else exact)
