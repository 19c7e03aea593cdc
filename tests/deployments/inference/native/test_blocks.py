"""KV blocks without a model: which sequence holds a block, which may read it, which writes to it."""

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.inference.native.blocks import KvBlockAllocator
from deployments.inference.native.kv import prefix_owner
from deployments.inference.native.sequence import Sequence
from deployments.inference.native.settings import KvSizes
from deployments.inference.request import AdapterRef
from tests.support.engine import request

SIZES = KvSizes(blocks=8, block_tokens=4, context=32)
PROMPT = tuple(range(10))


def sequence(prompt: tuple[int, ...] = PROMPT, key: str = "", adapter: str = "") -> Sequence:
    return Sequence(request("r", prompt, AdapterRef(adapter, adapter, "") if adapter else None, fairness_key=key))


def blocks(sizes: KvSizes = SIZES, prefix_cache: bool = True, shared_prefixes: bool = False) -> KvBlockAllocator:
    return KvBlockAllocator(sizes, max_running=4, prefix_cache=prefix_cache, shared_prefixes=shared_prefixes)


def allocated(kv: KvBlockAllocator, one: Sequence) -> Sequence:
    assert kv.can_allocate(one)
    kv.allocate(one)
    return one


def computed(kv: KvBlockAllocator, one: Sequence) -> Sequence:
    """Its prompt is computed, and a token was sampled over it."""
    allocated(kv, one)
    one.computed_tokens = len(one.token_ids)
    one.token_ids.append(99)
    return one


def ended(kv: KvBlockAllocator, one: Sequence, is_valid: bool = True) -> Sequence:
    computed(kv, one)
    kv.free(one, is_valid)
    return one


def test_blocks_grow_with_the_sequence() -> None:
    kv, one = blocks(), sequence()
    allocated(kv, one)
    for tokens in range(10, 33):
        assert kv.try_append(one)
        assert kv.used == len(one.blocks) == -(-tokens // 4)
        one.token_ids.append(1)
    assert not kv.try_append(one), "the pool is full, and nothing was given"
    assert (kv.used, kv.available) == (8, 0)
    kv.free(one, is_valid=True)
    assert (kv.used, kv.available) == (0, 8)


def test_whole_blocks_are_shared_with_a_running_sequence() -> None:
    kv = blocks()
    first = computed(kv, sequence())
    kv.try_append(first)
    second = allocated(kv, sequence())
    assert second.computed_tokens == second.cached_tokens == 8
    assert second.blocks[:2] == first.blocks[:2]
    assert second.blocks[2] != first.blocks[2]
    assert kv.used == 4
    kv.free(first, is_valid=True)
    assert kv.used == 3, "what the second reads is still held"


def test_blocks_not_shared_before_a_token_is_sampled() -> None:
    kv = blocks()
    first = allocated(kv, sequence())
    first.computed_tokens = 10
    kv.try_append(first)
    assert allocated(kv, sequence()).cached_tokens == 0
    kv.free(first, is_valid=True)
    assert allocated(kv, sequence()).cached_tokens == 0


@pytest.mark.parametrize(
    ("prompt", "key", "adapter", "cached"),
    [
        (PROMPT, "k", "a", 8),
        (PROMPT[:9], "k", "a", 8),
        (PROMPT[:8], "k", "a", 4),
        ((*PROMPT[:7], 99, 98), "k", "a", 4),
        ((99, *PROMPT[1:]), "k", "a", 0),
        (PROMPT[4:], "k", "a", 0),
        (PROMPT, "other", "a", 0),
        (PROMPT, "k", "other", 0),
        (PROMPT, "k", "", 0),
    ],
)
def test_prefix_cache_hit_needs_same_key_and_adapter(
    prompt: tuple[int, ...], key: str, adapter: str, cached: int
) -> None:
    kv = blocks()
    ended(kv, sequence(PROMPT, "k", "a"))
    assert allocated(kv, sequence(prompt, key, adapter)).cached_tokens == cached


def test_shared_prefixes_hit_across_keys_not_adapters() -> None:
    kv = blocks(shared_prefixes=True)
    ended(kv, sequence(PROMPT, "k", "a"))
    assert allocated(kv, sequence(PROMPT, "other", "a")).cached_tokens == 8
    assert allocated(kv, sequence(PROMPT, "k", "b")).cached_tokens == 0


def test_no_hit_without_prefix_cache() -> None:
    kv = blocks(prefix_cache=False)
    ended(kv, sequence())
    assert allocated(kv, sequence()).cached_tokens == 0


def test_invalid_blocks_are_never_reused() -> None:
    kv = blocks()
    ended(kv, sequence())
    ended(kv, sequence(), is_valid=False)
    assert allocated(kv, sequence()).cached_tokens == 0


def test_prefix_survives_a_sequence_that_ends_before_its_first_token() -> None:
    kv = blocks()
    ended(kv, sequence())
    kv.free(allocated(kv, sequence((*PROMPT, *PROMPT))), is_valid=True)
    assert allocated(kv, sequence()).cached_tokens == 8


def test_empty_blocks_are_used_before_the_longest_idle() -> None:
    kv = blocks(KvSizes(blocks=6, block_tokens=4, context=24))
    ended(kv, sequence(PROMPT, "old"))
    ended(kv, sequence(PROMPT, "new"))
    kv.free(allocated(kv, sequence(PROMPT, "another")), is_valid=False)
    assert [allocated(kv, sequence(PROMPT, key)).cached_tokens for key in ("old", "new")] == [4, 8]


def test_shared_blocks_need_no_room() -> None:
    kv = blocks(KvSizes(blocks=4, block_tokens=4, context=16))
    first = computed(kv, sequence())
    kv.try_append(first)
    assert not kv.can_allocate(sequence(PROMPT, "other"))
    allocated(kv, sequence())
    assert (kv.used, kv.available) == (4, 0)


def test_sequences_bounded_by_rows_of_the_block_table() -> None:
    kv = blocks()
    slots = [allocated(kv, sequence((i,))).kv_slot for i in range(4)]
    assert sorted(slots) == [0, 1, 2, 3]
    assert not kv.can_allocate(sequence((5,)))


@dataclass
class Model:
    """Sequences that write their token history where they compute, so that each can check what it reads."""

    kv: KvBlockAllocator
    running: list[Sequence] = field(default_factory=list)
    waiting: list[Sequence] = field(default_factory=list)
    written: dict[tuple[int, int], object] = field(default_factory=dict)
    invalid: set[int] = field(default_factory=set)

    def admit(self, one: Sequence) -> None:
        if not self.kv.can_allocate(one):
            self.waiting.append(one)
            return
        self.kv.allocate(one)
        self.running.append(one)
        assert one.computed_tokens < len(one.token_ids)
        assert one.was_admitted or one.cached_tokens == one.computed_tokens
        one.was_admitted = True
        assert not self.invalid & set(one.blocks[: one.computed_tokens // SIZES.block_tokens])

    def step(self, one: Sequence, count: int, token: int) -> None:
        """Compute some tokens; after the last of them comes another."""
        while not self.kv.try_append(one):
            assert self.running != [one], "one alone always fits"
            last = self.running.pop()
            self.kv.free(last, is_valid=True)
            last.computed_tokens = 0
            self.waiting.append(last)
            if last is one:
                return
        for position in range(one.computed_tokens, min(len(one.token_ids), one.computed_tokens + count)):
            block, offset = one.blocks[position // SIZES.block_tokens], position % SIZES.block_tokens
            assert sum(block in other.blocks for other in self.running) == 1, "a shared block is never written"
            self.written[block, offset] = self.history(one, position)
            self.invalid.discard(block)
            one.computed_tokens += 1
        if one.computed_tokens == len(one.token_ids) < SIZES.context - 1:
            one.token_ids.append(token)

    def end(self, one: Sequence, is_valid: bool) -> None:
        self.running.remove(one)
        if not is_valid:
            self.invalid |= set(one.blocks)
        self.kv.free(one, is_valid)

    def history(self, one: Sequence, position: int) -> object:
        return prefix_owner(one, False), one.token_ids[: position + 1]

    def check(self) -> None:
        held = {block for one in self.running for block in one.blocks}
        assert (self.kv.used, self.kv.available) == (len(held), self.kv.count - len(held))
        for one in self.running:
            assert len(set(one.blocks)) == len(one.blocks)
            for position in range(one.computed_tokens):
                block, offset = one.blocks[position // SIZES.block_tokens], position % SIZES.block_tokens
                assert self.written[block, offset] == self.history(one, position)


ACTIONS = st.tuples(
    st.sampled_from(["add", "step", "step", "step", "end", "fail", "readmit"]), st.integers(0, 3), st.integers(1, 20)
)


@given(st.lists(ACTIONS, max_size=60))
def test_any_sequence_reads_its_own_history_and_writes_to_unshared_blocks(
    actions: list[tuple[str, int, int]],
) -> None:
    """Few tokens and two keys, so that many prefixes are equal; few blocks, so that few sequences fit."""
    model = Model(blocks())
    for what, which, number in actions:
        one = model.running[which % len(model.running)] if model.running else None
        if what == "add":
            model.admit(sequence(tuple(i % (2 + which) for i in range(number)), "xy"[number % 2]))
        elif what == "readmit" and model.waiting:
            model.admit(model.waiting.pop(0))
        elif what == "step" and one:
            model.step(one, number, number % 2)
        elif what in ("end", "fail") and one:
            model.end(one, is_valid=what == "end")
        model.check()
    for one in list(model.running):
        model.end(one, is_valid=True)
    assert (model.kv.used, model.kv.available) == (0, model.kv.count)
