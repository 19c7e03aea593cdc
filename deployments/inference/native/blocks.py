"""Allocate the blocks of a paged KV cache, and share those with equal prefixes between sequences.

Decides only, without torch. A sequence has as many blocks as its tokens need::

    token_ids   a b c d | e f g h | i j      whole, verified blocks are shared by sequences with the same prefix;
    blocks         5    |    2    |  7       the next token is written to a block that no other sequence reads
"""

from array import array
from collections import Counter
from hashlib import sha256
from itertools import takewhile

from deployments.inference.native.kv import prefix_owner
from deployments.inference.native.sequence import Sequence
from deployments.inference.native.settings import KvSizes


class KvBlockAllocator:
    """Blocks 0 to ``count - 1``, each of them empty, held by running sequences, or idle.

    An idle block is whole and no sequence holds it. It stays in the prefix cache until its memory is needed.
    """

    def __init__(self, sizes: KvSizes, max_running: int, prefix_cache: bool, shared_prefixes: bool = False) -> None:
        self.count = sizes.blocks
        self._tokens = sizes.block_tokens
        self._prefix_cache = prefix_cache
        self._shared = shared_prefixes
        self._slots = list(reversed(range(max_running)))
        """Free rows of the block table."""
        self._empty = list(reversed(range(sizes.blocks)))
        self._idle: dict[int, None] = {}
        """Longest idle first."""
        self._held: Counter[int] = Counter()
        """Block to the number of sequences that hold it."""
        self._keys: dict[int, bytes] = {}
        """Block to its key, for the blocks that may be shared."""
        self._by_key: dict[bytes, int] = {}
        self._published: dict[Sequence, int] = {}
        """Running sequence to how many of its blocks, from the first, are shared or may be."""

    @property
    def available(self) -> int:
        return len(self._empty) + len(self._idle)

    @property
    def used(self) -> int:
        return len(self._held)

    def can_allocate(self, sequence: Sequence) -> bool:
        """True if ``allocate`` would succeed now."""
        found = self._found(sequence)
        spared = sum(block in self._held for block in found)
        return bool(self._slots) and self._needed(sequence) - spared <= self.available

    def allocate(self, sequence: Sequence) -> None:
        """Give the sequence blocks for all of its tokens, beginning with those that hold its prefix already."""
        found = self._found(sequence)
        for block in found:
            self._idle.pop(block, None)
            self._held[block] += 1
        sequence.kv_slot, sequence.blocks = self._slots.pop(), tuple(found)
        sequence.computed_tokens = len(found) * self._tokens
        if not sequence.was_admitted:
            sequence.cached_tokens = sequence.computed_tokens
        self._published[sequence] = len(found)
        has_room = self.try_append(sequence)
        assert has_room, "call can_allocate first"

    def try_append(self, sequence: Sequence) -> bool:
        """Give it blocks for its newest tokens; if there are too few, give none and return False."""
        if sequence.is_verified:
            self._publish(sequence)
        missing = self._needed(sequence) - len(sequence.blocks)
        if missing > self.available:
            return False
        if missing:
            sequence.blocks += tuple(self._take() for _ in range(missing))
        return True

    def free(self, sequence: Sequence, is_valid: bool) -> None:
        """Take its blocks back. If it is not valid, none of them stays in the prefix cache."""
        if not is_valid:
            for block in sequence.blocks:
                self._forget(block)
        elif sequence.is_verified:
            self._publish(sequence)
        for block in reversed(sequence.blocks):  # the oldest idle block is reused first: of a prefix, its end
            self._put(block)
        self._slots.append(sequence.kv_slot)
        sequence.kv_slot, sequence.blocks = -1, ()
        del self._published[sequence]
        assert len(self._empty) + len(self._idle) + len(self._held) == self.count

    def _needed(self, sequence: Sequence) -> int:
        return -(-len(sequence.token_ids) // self._tokens)

    def _take(self) -> int:
        """An empty block, else the one that has been idle the longest."""
        if self._empty:
            block = self._empty.pop()
        else:
            block = next(iter(self._idle))
            del self._idle[block]
            self._forget(block)
        self._held[block] = 1
        return block

    def _put(self, block: int) -> None:
        self._held[block] -= 1
        if self._held[block]:
            return
        del self._held[block]
        if block in self._keys:
            self._idle[block] = None
        else:
            self._empty.append(block)

    def _found(self, sequence: Sequence) -> list[int]:
        """The blocks that hold its prefix. At least its last token is left to compute, for its logits."""
        if not self._prefix_cache:
            return []
        keys = self._keys_of(sequence, (len(sequence.token_ids) - 1) // self._tokens)
        return [self._by_key[key] for key in takewhile(self._by_key.__contains__, keys)]

    def _publish(self, sequence: Sequence) -> None:
        """Let others share its whole blocks; where another block has the same key, that one stays shared."""
        whole, done = sequence.computed_tokens // self._tokens, self._published[sequence]
        if whole == done or not self._prefix_cache:
            return
        keys = self._keys_of(sequence, whole)
        for block, key in zip(sequence.blocks[done:whole], keys[done:], strict=True):
            if key not in self._by_key:
                self._by_key[key], self._keys[block] = block, key
        self._published[sequence] = whole

    def _forget(self, block: int) -> None:
        if block in self._keys:
            del self._by_key[self._keys.pop(block)]

    def _keys_of(self, sequence: Sequence, count: int) -> list[bytes]:
        """The keys of its first blocks: a hash over its owner and all tokens up to the block's end."""
        keys = sequence.block_keys
        while len(keys) < count:
            before = keys[-1] if keys else sha256(repr(prefix_owner(sequence, self._shared)).encode()).digest()
            start = len(keys) * self._tokens
            tokens = array("q", sequence.token_ids[start : start + self._tokens])
            keys.append(sha256(before + tokens.tobytes()).digest())
        return keys[:count]
