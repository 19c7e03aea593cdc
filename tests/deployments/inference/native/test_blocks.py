"""The laws of paged KV memory, without a model: who holds a block, who may read it, who writes to it."""

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.inference.native.blocks import KvBlocks
from deployments.inference.native.kv import owner_of
from deployments.inference.native.sequence import Sequence
from deployments.inference.native.settings import EngineSettings, KvSizes
from deployments.inference.request import AdapterRef, ModelRejected
from tests.support.engine import request

SIZES = KvSizes(blocks=8, block_tokens=4, context=32)
PROMPT = tuple(range(10))


def sequence(prompt: tuple[int, ...] = PROMPT, key: str = "", adapter: str = "") -> Sequence:
    return Sequence(request("r", prompt, AdapterRef(adapter, adapter, "") if adapter else None, fairness_key=key))


def blocks(sizes: KvSizes = SIZES, prefix_cache: bool = True, shared_prefixes: bool = False) -> KvBlocks:
    return KvBlocks(sizes, max_running=4, prefix_cache=prefix_cache, shared_prefixes=shared_prefixes)


def taken_in(kv: KvBlocks, one: Sequence) -> Sequence:
    assert kv.fits(one)
    kv.acquire(one)
    return one


def computed(kv: KvBlocks, one: Sequence) -> Sequence:
    """Its prompt is computed, and a token was sampled over it."""
    taken_in(kv, one)
    one.computed = len(one.token_ids)
    one.token_ids.append(99)
    return one


def ended(kv: KvBlocks, one: Sequence, sound: bool = True) -> Sequence:
    computed(kv, one)
    kv.release(one, sound)
    return one


def test_a_sequence_holds_as_many_blocks_as_its_tokens_need() -> None:
    kv, one = blocks(), sequence()
    taken_in(kv, one)
    for tokens in range(10, 33):
        assert kv.grow(one)
        assert kv.used == len(one.blocks) == -(-tokens // 4)
        one.token_ids.append(1)
    assert not kv.grow(one), "the pool is full, and nothing was given"
    assert (kv.used, kv.available) == (8, 0)
    kv.release(one, sound=True)
    assert (kv.used, kv.available) == (0, 8)


def test_whole_blocks_of_a_running_request_are_read_by_who_begins_alike() -> None:
    kv = blocks()
    first = computed(kv, sequence())
    kv.grow(first)
    second = taken_in(kv, sequence())
    assert second.computed == second.cached == 8
    assert second.blocks[:2] == first.blocks[:2]
    assert second.blocks[2] != first.blocks[2]
    assert kv.used == 4
    kv.release(first, sound=True)
    assert kv.used == 3, "what the second reads is still held"


def test_nothing_is_read_before_a_token_was_sampled_over_it() -> None:
    kv = blocks()
    first = taken_in(kv, sequence())
    first.computed = 10
    kv.grow(first)
    assert taken_in(kv, sequence()).cached == 0
    kv.release(first, sound=True)
    assert taken_in(kv, sequence()).cached == 0


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
def test_a_start_is_taken_over_by_whole_blocks_from_the_same_key_and_adapter_alone(
    prompt: tuple[int, ...], key: str, adapter: str, cached: int
) -> None:
    kv = blocks()
    ended(kv, sequence(PROMPT, "k", "a"))
    assert taken_in(kv, sequence(prompt, key, adapter)).cached == cached


def test_shared_prefixes_are_taken_over_between_keys_but_never_between_adapters() -> None:
    kv = blocks(shared_prefixes=True)
    ended(kv, sequence(PROMPT, "k", "a"))
    assert taken_in(kv, sequence(PROMPT, "other", "a")).cached == 8
    assert taken_in(kv, sequence(PROMPT, "k", "b")).cached == 0


def test_without_a_prefix_cache_nothing_is_taken_over() -> None:
    kv = blocks(prefix_cache=False)
    ended(kv, sequence())
    assert taken_in(kv, sequence()).cached == 0


def test_what_is_not_sound_is_never_taken_over_not_even_what_it_had_from_others() -> None:
    kv = blocks()
    ended(kv, sequence())
    ended(kv, sequence(), sound=False)
    assert taken_in(kv, sequence()).cached == 0


def test_a_request_that_leaves_before_its_first_token_takes_nothing_from_the_cache() -> None:
    kv = blocks()
    ended(kv, sequence())
    kv.release(taken_in(kv, sequence((*PROMPT, *PROMPT))), sound=True)
    assert taken_in(kv, sequence()).cached == 8


def test_empty_blocks_are_taken_first_then_the_longest_idle_and_of_a_prompt_its_end() -> None:
    kv = blocks(KvSizes(blocks=6, block_tokens=4, context=24))
    ended(kv, sequence(PROMPT, "old"))
    ended(kv, sequence(PROMPT, "new"))
    kv.release(taken_in(kv, sequence(PROMPT, "another")), sound=False)
    assert [taken_in(kv, sequence(PROMPT, key)).cached for key in ("old", "new")] == [4, 8]


def test_what_others_hold_already_needs_no_room() -> None:
    kv = blocks(KvSizes(blocks=4, block_tokens=4, context=16))
    first = computed(kv, sequence())
    kv.grow(first)
    assert not kv.fits(sequence(PROMPT, "other"))
    taken_in(kv, sequence())
    assert (kv.used, kv.available) == (4, 0)


def test_there_are_no_more_sequences_than_rows_of_the_table() -> None:
    kv = blocks()
    slots = [taken_in(kv, sequence((i,))).kv_slot for i in range(4)]
    assert sorted(slots) == [0, 1, 2, 3]
    assert not kv.fits(sequence((5,)))


@dataclass
class Model:
    """Sequences that write their history wherever they compute, to be found there by whoever reads it."""

    kv: KvBlocks
    running: list[Sequence] = field(default_factory=list)
    waiting: list[Sequence] = field(default_factory=list)
    written: dict[tuple[int, int], object] = field(default_factory=dict)
    spoilt: set[int] = field(default_factory=set)

    def admit(self, one: Sequence) -> None:
        if not self.kv.fits(one):
            self.waiting.append(one)
            return
        self.kv.acquire(one)
        self.running.append(one)
        assert one.computed < len(one.token_ids)
        assert one.admitted or one.cached == one.computed
        one.admitted = True
        assert not self.spoilt & set(one.blocks[: one.computed // SIZES.block_tokens])

    def step(self, one: Sequence, count: int, token: int) -> None:
        """Compute some tokens; after the last of them comes another."""
        while not self.kv.grow(one):
            assert self.running != [one], "one alone always fits"
            last = self.running.pop()
            self.kv.release(last, sound=True)
            last.computed = 0
            self.waiting.append(last)
            if last is one:
                return
        for position in range(one.computed, min(len(one.token_ids), one.computed + count)):
            block, place = one.blocks[position // SIZES.block_tokens], position % SIZES.block_tokens
            assert sum(block in other.blocks for other in self.running) == 1, "a shared block is never written"
            self.written[block, place] = self.history(one, position)
            self.spoilt.discard(block)
            one.computed += 1
        if one.computed == len(one.token_ids) < SIZES.context - 1:
            one.token_ids.append(token)

    def end(self, one: Sequence, sound: bool) -> None:
        self.running.remove(one)
        if not sound:
            self.spoilt |= set(one.blocks)
        self.kv.release(one, sound)

    def history(self, one: Sequence, position: int) -> object:
        return owner_of(one, False), one.token_ids[: position + 1]

    def check(self) -> None:
        held = {block for one in self.running for block in one.blocks}
        assert (self.kv.used, self.kv.available) == (len(held), self.kv.count - len(held))
        for one in self.running:
            assert len(set(one.blocks)) == len(one.blocks)
            for position in range(one.computed):
                block, place = one.blocks[position // SIZES.block_tokens], position % SIZES.block_tokens
                assert self.written[block, place] == self.history(one, position)


ACTIONS = st.tuples(
    st.sampled_from(["add", "step", "step", "step", "end", "fail", "readmit"]), st.integers(0, 3), st.integers(1, 20)
)


@given(st.lists(ACTIONS, max_size=60))
def test_whatever_comes_and_goes_each_reads_its_own_history_and_writes_where_nobody_reads(
    actions: list[tuple[str, int, int]],
) -> None:
    """Few tokens and two keys, so that much begins alike; few blocks, so that little fits."""
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
            model.end(one, sound=what == "end")
        model.check()
    for one in list(model.running):
        model.end(one, sound=True)
    assert (model.kv.used, model.kv.available) == (0, model.kv.count)


def test_the_longest_request_always_fits_or_the_settings_are_refused_by_name() -> None:
    settings = {"model_path": "", "max_context_tokens": 100, "max_running": 3}
    assert EngineSettings(**settings).kv_sizes(True) == KvSizes(blocks=12, block_tokens=32, context=100)
    assert EngineSettings(**settings, kv_block_tokens=10, kv_blocks=10).kv_sizes(True).each == 10
    assert EngineSettings(**settings).kv_sizes(False) == KvSizes(blocks=3, block_tokens=100, context=100)
    with pytest.raises(ModelRejected, match="raise kv_blocks to 10 or more, or lower max_context_tokens"):
        EngineSettings(**settings, kv_block_tokens=10, kv_blocks=9).kv_sizes(True)
    with pytest.raises(ModelRejected, match="kv_blocks must be at least 0"):
        EngineSettings(**settings, kv_blocks=-1)
    with pytest.raises(ModelRejected, match="are for a GPU"):
        EngineSettings(**settings, kv_blocks=10).kv_sizes(False)
