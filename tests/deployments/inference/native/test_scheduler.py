"""Who computes what, decided without a model: laws of the scheduler, the slots and the KV table."""

import random
import zlib
from collections import Counter
from dataclasses import replace

import pytest

from deployments.inference.fairness import IDLE_KEYS_KEPT, TokenCounters
from deployments.inference.native.blocks import KvBlocks
from deployments.inference.native.kv import KvTable, common_prefix
from deployments.inference.native.scheduler import Scheduler
from deployments.inference.native.sequence import Sequence, Work
from deployments.inference.native.settings import KvSizes
from deployments.inference.native.slots import FAILURE_S, FAILURES_KEPT, AdapterSlots
from deployments.inference.request import AdapterRef
from tests.support.engine import request


class Rows:
    """KV memory that only remembers what was asked of it."""

    def __init__(self) -> None:
        self.copies: list[tuple[int, int, int]] = []
        self.cleared: list[int] = []

    def copy(self, source: int, target: int, rows: int) -> None:
        self.copies.append((source, target, rows))

    def clear(self, slot: int) -> None:
        self.cleared.append(slot)


class House:
    """A scheduler with a loader that takes one step, and a model that answers 1 to everything.

    With ``blocks`` its KV memory is as many blocks of four tokens.
    """

    def __init__(
        self, running: int = 4, slots: int = 2, budget: int = 16, wait: float = 3.0, preempt: float = 1e9,
        blocks: int = 0,
    ) -> None:  # fmt: skip
        self.kv: KvBlocks | KvTable = KvTable(running, Rows(), prefix_cache=True)
        if blocks:
            self.kv = KvBlocks(KvSizes(blocks, 4, 4 * blocks), running, prefix_cache=True)
        self.slots = AdapterSlots(slots)
        self.scheduler = Scheduler(self.kv, self.slots, budget, wait, preempt)
        self.budget = budget
        self.now = 0.0
        self.finished: list[str] = []
        self._loading: list[str] = []

    def add(
        self, request_id: str, prompt: int = 4, out: int = 4, adapter: str = "", key: str = "", weight: float = 1.0
    ) -> Sequence:
        ref = AdapterRef(adapter, adapter, "") if adapter else None
        tokens = tuple(zlib.crc32(f"{request_id} {i}".encode()) % 1000 for i in range(prompt))
        asked = request(request_id, tokens, ref, fairness_key=key, max_tokens=out)
        sequence = Sequence(replace(asked, fairness_weight=weight))
        self.scheduler.add(sequence, self.now)
        return sequence

    def step(self) -> list[Work]:
        for digest in self._loading:
            self.slots.loaded(digest)
        plan = self.scheduler.schedule(self.now)
        self._loading = [load.ref.digest for load in self.slots.take_loads()]
        assert sum(work.count for work in plan) <= self.budget
        assert all(work.count > 0 for work in plan)
        completing = [work.sequence for work in plan if work.completes]
        for work in plan:
            self.scheduler.computed(work)
        for sequence in completing:
            sequence.token_ids.append(1)
            if sequence.completion_tokens == sequence.request.sampling.max_tokens:
                self.scheduler.remove(sequence)
                self.finished.append(sequence.request_id)
        self.now += 0.1
        return plan

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.step()


def test_every_running_decode_is_in_every_step_whatever_prefill_waits() -> None:
    house = House(running=4, budget=8)
    house.add("a", prompt=4, out=30)
    house.step()
    house.add("long", prompt=100)
    for _ in range(12):
        plan = house.step()
        assert "a" in {work.sequence.request_id for work in plan}
        assert sum(work.count for work in plan) <= 8


def test_a_long_prompt_is_computed_in_chunks_that_fill_the_budget() -> None:
    house = House(budget=16)
    house.add("a", prompt=40, out=1)
    assert [house.step()[0].count for _ in range(3)] == [16, 16, 8]
    assert house.finished == ["a"]


def test_rows_of_one_adapter_stand_together_and_the_base_model_last() -> None:
    house = House(running=6, slots=2, budget=64)
    for i, adapter in enumerate(["", "x", "y", "", "x", "y"]):
        house.add(str(i), adapter=adapter)
    house.steps(3)
    order = [work.sequence.adapter_slot for work in house.step()]
    assert order == sorted(order, key=lambda slot: (slot < 0, slot))
    assert set(order) == {-1, 0, 1}


def test_a_blocked_adapter_is_passed_over_not_waited_for() -> None:
    house = House(running=4, slots=1)
    house.add("a", adapter="x", out=50)
    house.steps(2)
    house.add("b", adapter="y")
    house.add("c", adapter="x")
    house.add("d")
    house.steps(8)
    assert set(house.finished) == {"c", "d"}


def test_an_adapter_that_waits_too_long_gets_the_slot_of_the_one_soonest_done() -> None:
    """With one slot and an unending stream for one adapter, another one would otherwise never run."""
    house = House(running=4, slots=1, wait=1.0)
    house.add("other", adapter="y", out=2)
    house.steps(4)
    for i in range(200):
        house.add(f"x{i}", adapter="x", out=4)
    house.steps(3)
    house.add("starved", adapter="y", out=2, key="other")
    house.steps(30)
    assert "starved" in house.finished
    house.steps(500)
    assert len(house.finished) == 202, "those that made way ran later"


def test_a_slot_is_never_taken_back_before_its_adapter_was_used() -> None:
    """Two adapters and one slot: each load is for somebody, so that loading always leads to an answer."""
    house = House(running=4, slots=1)
    for i in range(10):
        house.add(str(i), adapter="xy"[i % 2], out=2, key=str(i % 3))
    house.steps(60)
    assert len(house.finished) == 10


def test_three_requests_behind_thirty_of_another_key_do_not_wait_for_them() -> None:
    house = House(running=1, budget=16)
    for i in range(30):
        house.add(f"a{i}", key="a")
    house.steps(2)
    for i in range(3):
        house.add(f"b{i}", key="b")
    house.steps(200)
    assert all(house.finished.index(f"b{i}") <= 2 * i + 2 for i in range(3))


def test_keys_share_the_tokens_not_the_requests() -> None:
    """One key asks for four times as long answers: it gets about as many tokens, so a quarter of the requests."""
    house = House(running=2, budget=16)
    for i in range(200):
        house.add(f"long{i}", prompt=4, out=16, key="long")
        house.add(f"short{i}", prompt=4, out=4, key="short")
    house.steps(300)
    done = Counter(name.rstrip("0123456789") for name in house.finished)
    assert 2 < done["short"] / done["long"] < 4


def test_a_key_of_twice_the_weight_gets_twice_the_tokens() -> None:
    house = House(running=2, budget=16)
    for i in range(300):
        house.add(f"light{i}", key="light")
        house.add(f"heavy{i}", key="heavy", weight=2.0)
    house.steps(300)
    done = Counter(name.rstrip("0123456789") for name in house.finished)
    assert 1.6 < done["heavy"] / done["light"] < 2.4


def test_a_key_that_waits_gets_a_place_from_one_that_holds_two_more() -> None:
    """All places are taken by one key's endless answers; the other key's requests still begin and end."""
    house = House(running=4, budget=64, preempt=0.3)
    flood = [house.add(f"a{i}", out=500, key="a") for i in range(10)]
    house.steps(5)
    house.add("b0", out=10, key="b")
    house.add("b1", out=10, key="b")
    house.steps(30)
    assert house.finished == ["b0", "b1"]
    assert house.scheduler.preemptions == 2
    house.steps(2000)
    assert len(house.finished) == 12
    assert all(sequence.completion_tokens == 500 for sequence in flood), "what was set back was computed again"


def test_no_place_is_taken_where_that_would_not_be_fairer() -> None:
    house = House(running=3, budget=64, preempt=0.1)
    for key in "abc":
        house.add(key, out=50, key=key)
    house.steps(3)
    for key in "abcd":
        house.add(f"{key}2", out=50, key=key)
    house.steps(40)
    assert house.scheduler.preemptions == 0


def test_a_request_that_is_set_back_is_charged_and_cached_as_at_first() -> None:
    house = House(running=1, budget=64, preempt=0.1)
    first = house.add("first", prompt=20, out=50)
    house.steps(4)
    served = house.scheduler._counters.served("")
    house.scheduler._preempt(first, house.now)
    assert (first.kv_slot, first.adapter_slot, first.computed) == (-1, -1, 0)
    plan = house.step()
    assert sum(work.count for work in plan) + first.cached <= len(first.token_ids)
    assert first.cached == 0
    assert house.scheduler._counters.served("") == served + 2


def test_an_adapter_that_holds_its_slot_for_ever_is_set_back_in_the_end() -> None:
    house = House(running=4, slots=1, wait=1.0)
    endless = house.add("endless", adapter="x", out=3000)
    house.steps(3)
    house.add("starved", adapter="y", out=2, key="other")
    house.steps(60)
    assert house.finished == ["starved"]
    assert house.scheduler.preemptions >= 1
    house.steps(5)
    assert endless in house.scheduler.running, "it goes on when the other is done"


def test_where_decodes_outgrow_the_memory_the_last_admitted_makes_way_and_is_answered_later() -> None:
    house = House(running=4, budget=64, blocks=6)
    sequences = [house.add(name, prompt=4, out=20) for name in "abc"]
    house.steps(12)
    assert house.scheduler.running[0] is sequences[0], "the first goes on"
    assert house.scheduler.preemptions >= 1
    house.steps(100)
    assert house.finished == ["a", "b", "c"]
    assert all(sequence.completion_tokens == 20 for sequence in sequences)
    assert house.kv.used == 0


def test_a_request_enters_when_there_are_blocks_for_its_prompt() -> None:
    house = House(running=4, budget=64, blocks=6)
    house.add("a", prompt=15, out=5)
    house.add("b", prompt=9, out=1)
    house.add("c", prompt=4, out=1)
    assert [work.sequence.request_id for work in house.step()] == ["a"]
    house.steps(4)
    assert house.finished == ["a"], "c did not overtake b"
    house.steps(1)
    assert house.finished == ["a", "b", "c"]


def test_a_long_prompt_is_not_kept_waiting_by_any_number_of_short_ones() -> None:
    house = House(running=8, budget=64, blocks=8)
    for i in range(8):
        house.add(f"a{i}", out=4 + i % 4)
    house.steps(2)
    house.add("long", prompt=28, out=2)
    for i in range(100):
        house.add(f"b{i}", out=4)
        house.step()
    assert house.finished.index("long") <= 8


def test_a_key_that_waits_for_blocks_gets_them_from_one_that_holds_two_places_more() -> None:
    house = House(running=8, budget=64, preempt=0.3, blocks=32)
    for i in range(4):
        house.add(f"a{i}", prompt=28, out=90, key="a")
    house.steps(4)
    house.add("b", prompt=8, out=10, key="b")
    house.steps(20)
    assert house.finished == ["b"]
    house.steps(1000)
    assert len(house.finished) == 5


def test_a_key_that_pauses_saves_up_no_turns() -> None:
    counters = TokenCounters()
    counters.enter("busy")
    counters.charge("busy", prompt_tokens=1000)
    counters.enter("new")
    assert counters.served("new") == 1000
    counters.leave("new")
    counters.charge("busy", prompt_tokens=1000)
    counters.enter("new")
    assert counters.served("new") == 2000


def test_a_key_that_leaves_keeps_its_debt_and_the_memory_of_keys_is_bounded() -> None:
    counters = TokenCounters()
    counters.enter("steady")
    counters.enter("greedy")
    counters.charge("greedy", prompt_tokens=500)
    counters.leave("greedy")
    counters.enter("greedy")
    assert counters.served("greedy") == 500
    for i in range(3 * IDLE_KEYS_KEPT):
        counters.enter(str(i))
        counters.leave(str(i))
    assert len(counters._served) <= IDLE_KEYS_KEPT + 3


def test_pinned_adapters_stay_and_one_slot_always_stays_for_others() -> None:
    slots = AdapterSlots(2)
    refs = {name: AdapterRef(name, name, "") for name in "abc"}
    slots.pin(["a", "b", "c"])
    for name in "abcbc":
        slots.acquire(refs[name], ())
        slots.take_loads()
        slots.loaded(name)
        assert slots.acquire(refs[name], ()) is not None
        slots.release(name)
    assert {resident.ref.name for resident in slots.residents} == {"a", "c"}


def test_a_bad_adapter_is_refused_for_a_while_and_then_tried_again() -> None:
    slots = AdapterSlots(1)
    ref = AdapterRef("a", "a", "")
    slots.prepare(ref, ())
    slots.failed("a", "no good", now=0.0)
    assert slots.failure("a", now=1.0) == "no good"
    assert slots.failure("a", now=FAILURE_S) is None
    assert slots.has_room
    for i in range(2 * FAILURES_KEPT):
        slots.prepare(AdapterRef(str(i), str(i), ""), ())
        slots.failed(str(i), "no good", now=0.0)
    assert len(slots._failures) <= FAILURES_KEPT


@pytest.mark.parametrize("is_paged", [False, True], ids=["slots", "blocks"])
@pytest.mark.parametrize("seed", range(8))
def test_whatever_comes_and_goes_everybody_ends_and_everything_is_free_again(seed: int, is_paged: bool) -> None:
    rng = random.Random(seed)
    house = House(
        running=rng.randrange(1, 6), slots=rng.randrange(1, 4), budget=rng.randrange(8, 40), wait=0.5, preempt=0.2,
        blocks=rng.randrange(15, 30) if is_paged else 0,
    )  # fmt: skip
    live: dict[str, Sequence] = {}
    aborted = 0
    for i in range(150):
        if rng.random() < 0.6:
            adapter = rng.choice(["", "a", "b", "c", "d", "e"])
            key = rng.choice("xyz")
            live[str(i)] = house.add(str(i), rng.randrange(1, 50), rng.randrange(1, 10), adapter, key)
        house.step()
        for name in house.finished:
            live.pop(name, None)
        if live and rng.random() < 0.2:
            house.scheduler.remove(live.pop(rng.choice(list(live))))
            aborted += 1
    house.steps(2000)
    assert not house.scheduler.running
    assert not house.scheduler.waiting
    assert house.kv.used == 0
    assert all(resident.references == 0 for resident in house.slots.residents)
    assert len(house.finished) == len(set(house.finished))


def _ended(table: KvTable, prompt: tuple[int, ...], key: str = "", adapter: str = "", sound: bool = True) -> Sequence:
    ref = AdapterRef(adapter, adapter, "") if adapter else None
    sequence = Sequence(request("r", prompt, ref, fairness_key=key))
    table.acquire(sequence)
    sequence.computed = len(prompt)
    sequence.token_ids.append(1)
    table.release(sequence, sound)
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
def test_a_prompts_start_is_taken_over_from_the_same_key_and_adapter_alone(
    prompt: tuple[int, ...], key: str, adapter: str, cached: int
) -> None:
    table = KvTable(3, Rows(), prefix_cache=True)
    _ended(table, LONG, "k", "a")
    assert _ended(table, prompt, key, adapter).cached == cached


def test_the_start_of_a_running_request_is_copied() -> None:
    rows = Rows()
    table = KvTable(3, rows, prefix_cache=True)
    first = Sequence(request("1", LONG))
    table.acquire(first)
    first.computed = 25
    second = Sequence(request("2", LONG))
    table.acquire(second)
    assert second.computed == 25
    assert rows.copies == [(first.kv_slot, second.kv_slot, 25)]


def test_what_is_not_sound_is_cleared_and_never_taken_over() -> None:
    rows = Rows()
    table = KvTable(1, rows, prefix_cache=True)
    _ended(table, LONG, sound=False)
    assert rows.cleared == [0]
    assert _ended(table, LONG).cached == 0


def test_shared_prefixes_are_taken_over_between_keys_but_never_between_adapters() -> None:
    table = KvTable(3, Rows(), prefix_cache=True, shared_prefixes=True)
    _ended(table, LONG, "k", "a")
    assert _ended(table, LONG, "other", "a").cached == 39
    assert _ended(table, LONG, "other", "b").cached == 0


def test_without_a_prefix_cache_nothing_is_taken_over() -> None:
    table = KvTable(1, Rows(), prefix_cache=False)
    _ended(table, LONG)
    assert _ended(table, LONG).cached == 0


def test_the_common_start_is_exact() -> None:
    rng = random.Random(0)
    for _ in range(300):
        left = [rng.randrange(2) for _ in range(rng.randrange(12))]
        right = left[: rng.randrange(12)] + [rng.randrange(2) for _ in range(rng.randrange(5))]
        exact = next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), None)
        assert common_prefix(left, right) == (min(len(left), len(right)) if exact is None else exact)


@pytest.mark.parametrize("blocks", [0, 12])
def test_long_ones_that_want_one_slot_do_not_set_each_other_back_for_ever(blocks: int) -> None:
    """Each takes longer to compute than the others wait: whoever runs gets a token before it makes way."""
    house = House(running=2, slots=1, budget=3, wait=0.3, blocks=blocks)
    for adapter in "xyz":
        house.add(adapter, prompt=40, out=8, adapter=adapter, key=adapter)
    house.steps(1_000)
    assert sorted(house.finished) == ["x", "y", "z"]
