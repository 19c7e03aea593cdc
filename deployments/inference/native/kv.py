"""Which slot of the KV memory belongs to which sequence, and what a new prompt can take over from old ones.

On a CPU: a sequence's keys and values lie in one piece. Decides only, torch-free; they are moved by the ``KvRows``
it is given. A prompt's start is taken over only from the same adapter bytes and, unless prefixes are shared, the same
fairness key: nobody can time another's prompts.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol

from deployments.inference.native.sequence import Sequence

SHORTEST_PREFIX = 8
"""Tokens; a shorter one costs more to find than to compute."""


class KvRows(Protocol):
    """The memory itself. A row is one position of one slot, in every layer."""

    def copy(self, source: int, target: int, rows: int) -> None:
        """Copy the first rows of one slot into another."""

    def clear(self, slot: int) -> None:
        """Make a slot's rows finite: attention multiplies rows past a sequence's end by zero."""


@dataclass(frozen=True, slots=True)
class CachedPrefix:
    """What an ended sequence left in its slot."""

    owner: tuple[str, str]
    token_ids: Seq[int]


class KvTable:
    """Slots 0 to ``count - 1``; a sequence holds one for as long as it runs."""

    def __init__(self, count: int, rows: KvRows, prefix_cache: bool, shared_prefixes: bool = False) -> None:
        self.count = count
        self._shared = shared_prefixes
        self._rows = rows
        self._prefix_cache = prefix_cache
        self._held: dict[int, Sequence] = {}
        self._free: dict[int, CachedPrefix | None] = dict.fromkeys(range(count))
        """Longest free first."""

    @property
    def used(self) -> int:
        return len(self._held)

    def fits(self, _: Sequence) -> bool:
        """It can be acquired now."""
        return bool(self._free)

    def grow(self, _: Sequence) -> bool:
        """There is room for its newest token: a slot has a whole context."""
        return True

    def acquire(self, sequence: Sequence) -> None:
        """Give the sequence a slot, with as much of its tokens as some slot already holds.

        At least the last token is left to compute: its logits are needed.
        """
        source, rows = self._longest_prefix(sequence)
        slot = source if source in self._free else self._emptiest()
        del self._free[slot]
        if rows and source != slot:
            self._rows.copy(source, slot, rows)
        self._held[slot] = sequence
        sequence.kv_slot, sequence.computed = slot, rows
        if not sequence.admitted:
            sequence.cached = rows

    def release(self, sequence: Sequence, sound: bool) -> None:
        slot = sequence.kv_slot
        assert self._held.pop(slot) is sequence
        sound = sound and sequence.covered
        if not sound:
            self._rows.clear(slot)
        kept = sound and self._prefix_cache
        self._free[slot] = (
            CachedPrefix(self._owner(sequence), sequence.token_ids[: sequence.computed]) if kept else None
        )
        sequence.kv_slot = -1
        assert len(self._free) + len(self._held) == self.count

    def _longest_prefix(self, sequence: Sequence) -> tuple[int, int]:
        """The slot that holds most of this sequence, and how much; (-1, 0) if none holds enough."""
        if not self._prefix_cache:
            return -1, 0
        owner, wanted = self._owner(sequence), sequence.token_ids[:-1]
        sources = {
            slot: remains.token_ids for slot, remains in self._free.items() if remains and remains.owner == owner
        }
        for slot, running in self._held.items():
            if self._owner(running) == owner:
                sources[slot] = running.token_ids[: running.computed]
        found = max(((common_prefix(wanted, tokens), slot) for slot, tokens in sources.items()), default=(0, -1))
        return (found[1], found[0]) if found[0] >= SHORTEST_PREFIX else (-1, 0)

    def _owner(self, sequence: Sequence) -> tuple[str, str]:
        return owner_of(sequence, self._shared)

    def _emptiest(self) -> int:
        """The lowest slot that holds nothing, else the one that has been free the longest."""
        empty = [slot for slot, remains in self._free.items() if remains is None]
        return min(empty) if empty else next(iter(self._free))


def owner_of(sequence: Sequence, is_shared: bool) -> tuple[str, str]:
    """Whose what it computes is: nobody else may take it over."""
    return sequence.digest, "" if is_shared else sequence.request.fairness_key


def common_prefix(left: Seq[int], right: Seq[int]) -> int:
    """How many tokens both begin with, by halving."""
    low, high = 0, min(len(left), len(right))
    while low < high:
        middle = (low + high + 1) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
