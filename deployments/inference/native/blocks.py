"""Which blocks of a paged KV memory belong to which sequence, and which of them several may read.

Decides only, torch-free. A sequence has as many blocks as its tokens need::

    token_ids   a b c d | e f g h | i j      whole blocks that are known to be sound are read by whoever
    blocks         5    |    2    |  7       begins alike; the next token goes where nobody else reads
"""

from array import array
from collections import Counter
from hashlib import sha256
from itertools import takewhile

from deployments.inference.native.kv import owner_of
from deployments.inference.native.sequence import Sequence
from deployments.inference.native.settings import KvSizes


class KvBlocks:
    """Blocks 0 to ``count - 1``, each of them empty, held by running sequences, or idle.

    An idle one is whole and held by nobody: it waits for a sequence with its tokens until an empty one is wanted.
    """

    def __init__(self, sizes: KvSizes, max_running: int, prefix_cache: bool, shared_prefixes: bool = False) -> None:
        self.count = sizes.blocks
        self._tokens = sizes.block_tokens
        self._prefix_cache = prefix_cache
        self._shared = shared_prefixes
        self._slots = list(reversed(range(max_running)))
        """Rows of the block table that are free."""
        self._empty = list(reversed(range(sizes.blocks)))
        self._idle: dict[int, None] = {}
        """Longest idle first."""
        self._held: Counter[int] = Counter()
        """By how many sequences."""
        self._keys: dict[int, bytes] = {}
        """Of the blocks that may be shared."""
        self._by_key: dict[bytes, int] = {}
        self._published: dict[Sequence, int] = {}
        """How many of its blocks, from the first, each running sequence has offered to others or has from them."""

    @property
    def available(self) -> int:
        return len(self._empty) + len(self._idle)

    @property
    def used(self) -> int:
        return len(self._held)

    def fits(self, sequence: Sequence) -> bool:
        """It can be acquired now."""
        found = self._found(sequence)
        spared = sum(block in self._held for block in found)
        return bool(self._slots) and self._needed(sequence) - spared <= self.available

    def acquire(self, sequence: Sequence) -> None:
        """Give the sequence blocks for all of its tokens, those that hold its start already among them."""
        found = self._found(sequence)
        for block in found:
            self._idle.pop(block, None)
            self._held[block] += 1
        sequence.kv_slot, sequence.blocks = self._slots.pop(), tuple(found)
        sequence.computed = len(found) * self._tokens
        if not sequence.admitted:
            sequence.cached = sequence.computed
        self._published[sequence] = len(found)
        is_whole = self.grow(sequence)
        assert is_whole, "it was said to fit"

    def grow(self, sequence: Sequence) -> bool:
        """Give it blocks for its newest tokens too; False, and nothing, if there are too few."""
        if sequence.covered:
            self._publish(sequence)
        missing = self._needed(sequence) - len(sequence.blocks)
        if missing > self.available:
            return False
        if missing:
            sequence.blocks += tuple(self._take() for _ in range(missing))
        return True

    def release(self, sequence: Sequence, sound: bool) -> None:
        """Take everything back. Not ``sound``: none of its blocks is given to anybody else with what is in it."""
        if not sound:
            for block in sequence.blocks:
                self._forget(block)
        elif sequence.covered:
            self._publish(sequence)
        for block in reversed(sequence.blocks):  # a start is of more use than what follows, so it is idle last
            self._put(block)
        self._slots.append(sequence.kv_slot)
        sequence.kv_slot, sequence.blocks = -1, ()
        del self._published[sequence]
        assert len(self._empty) + len(self._idle) + len(self._held) == self.count

    def _needed(self, sequence: Sequence) -> int:
        return -(-len(sequence.token_ids) // self._tokens)

    def _take(self) -> int:
        """An empty block, else what has been idle the longest."""
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
        """The blocks that hold its start. At least its last token is left to compute: its logits are needed."""
        if not self._prefix_cache:
            return []
        keys = self._keys_of(sequence, (len(sequence.token_ids) - 1) // self._tokens)
        return [self._by_key[key] for key in takewhile(self._by_key.__contains__, keys)]

    def _publish(self, sequence: Sequence) -> None:
        """Offer its whole blocks; where another one holds the same already, that one stays."""
        whole, done = sequence.computed // self._tokens, self._published[sequence]
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
        """Of its first blocks: each key stands for its owner and for every token up to the block's end."""
        keys = sequence.block_keys
        while len(keys) < count:
            before = keys[-1] if keys else sha256(repr(owner_of(sequence, self._shared)).encode()).digest()
            start = len(keys) * self._tokens
            tokens = array("q", sequence.token_ids[start : start + self._tokens])
            keys.append(sha256(before + tokens.tobytes()).digest())
        return keys[:count]
