"""Allocate the KV cache on a CPU: each running sequence has one slot, as long as the whole context.

Decides only, without torch; the ``KvRows`` that it is given moves the data. A prefix cache hit needs the same adapter
bytes and, unless prefixes are shared, the same fairness key: so that no key can find out another's prompts by timing.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol

from deployments.inference.native.sequence import Sequence

MIN_PREFIX_TOKENS = 8
"""A shorter prefix costs more to find than to compute."""


class KvRows(Protocol):
    """The KV cache's data. A row is one position of one slot, in every layer."""

    def copy(self, source: int, target: int, rows: int) -> None:
        """Copy the first rows of one slot into another."""

    def clear(self, slot: int) -> None:
        """Set a slot to zeros. Attention multiplies rows past a sequence's end by zero, so they must be finite."""


@dataclass(frozen=True, slots=True)
class CachedPrefix:
    """What a sequence that has ended left in its slot."""

    owner: tuple[str, str]
    token_ids: Seq[int]


class KvSlotAllocator:
    """Slots 0 to ``count - 1``; a sequence has one for as long as it runs."""

    def __init__(self, count: int, rows: KvRows, prefix_cache: bool, shared_prefixes: bool = False) -> None:
        self.count = count
        self._shared = shared_prefixes
        self._rows = rows
        self._prefix_cache = prefix_cache
        self._used: dict[int, Sequence] = {}
        self._free: dict[int, CachedPrefix | None] = dict.fromkeys(range(count))
        """Longest free first."""

    @property
    def used(self) -> int:
        return len(self._used)

    def can_allocate(self, _: Sequence) -> bool:
        """True if ``allocate`` would succeed now."""
        return bool(self._free)

    def try_append(self, _: Sequence) -> bool:
        """True: a slot has room for the whole context."""
        return True

    def allocate(self, sequence: Sequence) -> None:
        """Give the sequence a slot, with the longest prefix of its tokens that some slot holds.

        At least its last token is left to compute, because the logits after it are needed.
        """
        source, rows = self._find_prefix(sequence)
        slot = source if source in self._free else self._next_free()
        del self._free[slot]
        if rows and source != slot:
            self._rows.copy(source, slot, rows)
        self._used[slot] = sequence
        sequence.kv_slot, sequence.computed_tokens = slot, rows
        if not sequence.was_admitted:
            sequence.cached_tokens = rows

    def free(self, sequence: Sequence, is_valid: bool) -> None:
        """Take the slot back. What is in it stays in the prefix cache if it is valid, else it is cleared."""
        slot = sequence.kv_slot
        assert self._used.pop(slot) is sequence
        is_valid = is_valid and sequence.is_verified
        if not is_valid:
            self._rows.clear(slot)
        self._free[slot] = None
        if is_valid and self._prefix_cache:
            self._free[slot] = CachedPrefix(self._owner(sequence), sequence.token_ids[: sequence.computed_tokens])
        sequence.kv_slot = -1
        assert len(self._free) + len(self._used) == self.count

    def _find_prefix(self, sequence: Sequence) -> tuple[int, int]:
        """The slot with the longest common prefix and its length; (-1, 0) if none is long enough."""
        if not self._prefix_cache:
            return -1, 0
        owner, wanted = self._owner(sequence), sequence.token_ids[:-1]
        sources = {slot: prefix.token_ids for slot, prefix in self._free.items() if prefix and prefix.owner == owner}
        for slot, running in self._used.items():
            if self._owner(running) == owner:
                sources[slot] = running.token_ids[: running.computed_tokens]
        found = max(((common_prefix(wanted, tokens), slot) for slot, tokens in sources.items()), default=(0, -1))
        return (found[1], found[0]) if found[0] >= MIN_PREFIX_TOKENS else (-1, 0)

    def _owner(self, sequence: Sequence) -> tuple[str, str]:
        return prefix_owner(sequence, self._shared)

    def _next_free(self) -> int:
        """The lowest slot without a cached prefix, else the one that has been free the longest."""
        empty = [slot for slot, prefix in self._free.items() if prefix is None]
        return min(empty) if empty else next(iter(self._free))


def prefix_owner(sequence: Sequence, is_shared: bool) -> tuple[str, str]:
    """Adapter digest and fairness key: only sequences with the same owner may reuse each other's KV cache."""
    return sequence.digest, "" if is_shared else sequence.request.fairness_key


def common_prefix(left: Seq[int], right: Seq[int]) -> int:
    """The number of tokens with which both begin, by bisection."""
    low, high = 0, min(len(left), len(right))
    while low < high:
        middle = (low + high + 1) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
