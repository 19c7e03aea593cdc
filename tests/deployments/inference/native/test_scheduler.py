"""The scheduler's policy, without a model: which sequences run, wait and are preempted."""

import random
import zlib
from collections import Counter
from dataclasses import replace

import pytest

from deployments.inference.native.blocks import KvBlockAllocator
from deployments.inference.native.kv import KvSlotAllocator
from deployments.inference.native.registry import AdapterRegistry
from deployments.inference.native.scheduler import Scheduler
from deployments.inference.native.sequence import ScheduledSequence, Sequence
from deployments.inference.native.settings import KvSizes
from deployments.inference.request import AdapterRef
from tests.support.engine import RecordedRows, request


class Simulation:
    """A scheduler, a loader that takes one step for each load, and a model that always generates token 1.

    With ``blocks`` the KV cache has that many blocks of four tokens; else it has slots.
    """

    def __init__(
        self, running: int = 4, slots: int = 2, budget: int = 16, wait: float = 3.0, preempt: float = 1e9,
        blocks: int = 0,
    ) -> None:  # fmt: skip
        self.kv: KvBlockAllocator | KvSlotAllocator = KvSlotAllocator(running, RecordedRows(), prefix_cache=True)
        if blocks:
            self.kv = KvBlockAllocator(KvSizes(blocks, 4, 4 * blocks), running, prefix_cache=True)
        self.slots = AdapterRegistry(slots)
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

    def step(self) -> list[ScheduledSequence]:
        for digest in self._loading:
            self.slots.mark_loaded(digest)
        batch = self.scheduler.schedule(self.now)
        self._loading = [load.ref.digest for load in self.slots.take_loads()]
        assert sum(one.count for one in batch) <= self.budget
        assert all(one.count > 0 for one in batch)
        sampled = [one.sequence for one in batch if one.is_sampled]
        for one in batch:
            self.scheduler.mark_computed(one)
        for sequence in sampled:
            sequence.token_ids.append(1)
            if sequence.completion_tokens == sequence.request.sampling.max_tokens:
                self.scheduler.remove(sequence)
                self.finished.append(sequence.request_id)
        self.now += 0.1
        return batch

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.step()


def test_decodes_are_in_every_step_beside_prefill() -> None:
    sim = Simulation(running=4, budget=8)
    sim.add("a", prompt=4, out=30)
    sim.step()
    sim.add("long", prompt=100)
    for _ in range(12):
        batch = sim.step()
        assert "a" in {one.sequence.request_id for one in batch}
        assert sum(one.count for one in batch) <= 8


def test_long_prompt_is_prefilled_in_chunks() -> None:
    sim = Simulation(budget=16)
    sim.add("a", prompt=40, out=1)
    assert [sim.step()[0].count for _ in range(3)] == [16, 16, 8]
    assert sim.finished == ["a"]


def test_batch_is_sorted_by_adapter_with_base_model_last() -> None:
    sim = Simulation(running=6, slots=2, budget=64)
    for i, adapter in enumerate(["", "x", "y", "", "x", "y"]):
        sim.add(str(i), adapter=adapter)
    sim.steps(3)
    order = [one.sequence.adapter_slot for one in sim.step()]
    assert order == sorted(order, key=lambda slot: (slot < 0, slot))
    assert set(order) == {-1, 0, 1}


def test_sequence_without_adapter_slot_is_skipped() -> None:
    sim = Simulation(running=4, slots=1)
    sim.add("a", adapter="x", out=50)
    sim.steps(2)
    sim.add("b", adapter="y")
    sim.add("c", adapter="x")
    sim.add("d")
    sim.steps(8)
    assert set(sim.finished) == {"c", "d"}


def test_starved_adapter_gets_the_slot_with_least_work_left() -> None:
    """With one slot and endless requests for one adapter, another one would otherwise never run."""
    sim = Simulation(running=4, slots=1, wait=1.0)
    sim.add("other", adapter="y", out=2)
    sim.steps(4)
    for i in range(200):
        sim.add(f"x{i}", adapter="x", out=4)
    sim.steps(3)
    sim.add("starved", adapter="y", out=2, key="other")
    sim.steps(30)
    assert "starved" in sim.finished
    sim.steps(500)
    assert len(sim.finished) == 202, "the sequences of the drained adapter ended too"


def test_adapter_not_evicted_before_first_use() -> None:
    """Two adapters share one slot. Each load is followed by a request that runs, so all of them end."""
    sim = Simulation(running=4, slots=1)
    for i in range(10):
        sim.add(str(i), adapter="xy"[i % 2], out=2, key=str(i % 3))
    sim.steps(60)
    assert len(sim.finished) == 10


def test_few_requests_do_not_wait_for_a_flood_of_another_key() -> None:
    sim = Simulation(running=1, budget=16)
    for i in range(30):
        sim.add(f"a{i}", key="a")
    sim.steps(2)
    for i in range(3):
        sim.add(f"b{i}", key="b")
    sim.steps(200)
    assert all(sim.finished.index(f"b{i}") <= 2 * i + 2 for i in range(3))


def test_keys_share_tokens_not_requests() -> None:
    """A key with completions four times as long gets about as many tokens, so a quarter of the requests."""
    sim = Simulation(running=2, budget=16)
    for i in range(200):
        sim.add(f"long{i}", prompt=4, out=16, key="long")
        sim.add(f"short{i}", prompt=4, out=4, key="short")
    sim.steps(300)
    done = Counter(name.rstrip("0123456789") for name in sim.finished)
    assert 2 < done["short"] / done["long"] < 4


def test_key_of_twice_the_weight_gets_twice_the_tokens() -> None:
    sim = Simulation(running=2, budget=16)
    for i in range(300):
        sim.add(f"light{i}", key="light")
        sim.add(f"heavy{i}", key="heavy", weight=2.0)
    sim.steps(300)
    done = Counter(name.rstrip("0123456789") for name in sim.finished)
    assert 1.6 < done["heavy"] / done["light"] < 2.4


def test_waiting_key_preempts_a_key_that_runs_two_more() -> None:
    """One key's long completions fill the batch; the other key's requests still run and end."""
    sim = Simulation(running=4, budget=64, preempt=0.3)
    flood = [sim.add(f"a{i}", out=500, key="a") for i in range(10)]
    sim.steps(5)
    sim.add("b0", out=10, key="b")
    sim.add("b1", out=10, key="b")
    sim.steps(30)
    assert sim.finished == ["b0", "b1"]
    assert sim.scheduler.preemptions == 2
    sim.steps(2000)
    assert len(sim.finished) == 12
    assert all(sequence.completion_tokens == 500 for sequence in flood), "preempted sequences end too"


def test_no_preemption_when_not_fairer() -> None:
    sim = Simulation(running=3, budget=64, preempt=0.1)
    for key in "abc":
        sim.add(key, out=50, key=key)
    sim.steps(3)
    for key in "abcd":
        sim.add(f"{key}2", out=50, key=key)
    sim.steps(40)
    assert sim.scheduler.preemptions == 0


def test_preempted_sequence_is_charged_once() -> None:
    sim = Simulation(running=1, budget=64, preempt=0.1)
    first = sim.add("first", prompt=20, out=50)
    sim.steps(4)
    served = sim.scheduler._counters.served("")
    sim.scheduler._preempt(first, sim.now)
    assert (first.kv_slot, first.adapter_slot, first.computed_tokens) == (-1, -1, 0)
    batch = sim.step()
    assert sum(one.count for one in batch) + first.cached_tokens <= len(first.token_ids)
    assert first.cached_tokens == 0
    assert sim.scheduler._counters.served("") == served + 2


def test_drained_adapter_is_preempted_after_patience() -> None:
    sim = Simulation(running=4, slots=1, wait=1.0)
    endless = sim.add("endless", adapter="x", out=3000)
    sim.steps(3)
    sim.add("starved", adapter="y", out=2, key="other")
    sim.steps(60)
    assert sim.finished == ["starved"]
    assert sim.scheduler.preemptions >= 1
    sim.steps(5)
    assert endless in sim.scheduler.running, "it is admitted again"


def test_last_admitted_is_preempted_when_blocks_run_out() -> None:
    sim = Simulation(running=4, budget=64, blocks=6)
    sequences = [sim.add(name, prompt=4, out=20) for name in "abc"]
    sim.steps(12)
    assert sim.scheduler.running[0] is sequences[0], "the first admitted goes on"
    assert sim.scheduler.preemptions >= 1
    sim.steps(100)
    assert sim.finished == ["a", "b", "c"]
    assert all(sequence.completion_tokens == 20 for sequence in sequences)
    assert sim.kv.used == 0


def test_sequence_admitted_when_blocks_for_its_prompt_are_free() -> None:
    sim = Simulation(running=4, budget=64, blocks=6)
    sim.add("a", prompt=15, out=5)
    sim.add("b", prompt=9, out=1)
    sim.add("c", prompt=4, out=1)
    assert [one.sequence.request_id for one in sim.step()] == ["a"]
    sim.steps(4)
    assert sim.finished == ["a"], "c does not overtake b"
    sim.steps(1)
    assert sim.finished == ["a", "b", "c"]


def test_short_prompts_do_not_overtake_a_long_one() -> None:
    sim = Simulation(running=8, budget=64, blocks=8)
    for i in range(8):
        sim.add(f"a{i}", out=4 + i % 4)
    sim.steps(2)
    sim.add("long", prompt=28, out=2)
    for i in range(100):
        sim.add(f"b{i}", out=4)
        sim.step()
    assert sim.finished.index("long") <= 8


def test_waiting_key_preempts_for_blocks() -> None:
    sim = Simulation(running=8, budget=64, preempt=0.3, blocks=32)
    for i in range(4):
        sim.add(f"a{i}", prompt=28, out=90, key="a")
    sim.steps(4)
    sim.add("b", prompt=8, out=10, key="b")
    sim.steps(20)
    assert sim.finished == ["b"]
    sim.steps(1000)
    assert len(sim.finished) == 5


@pytest.mark.parametrize("blocks", [0, 12])
def test_long_prompts_on_one_slot_do_not_livelock(blocks: int) -> None:
    """Each prompt takes longer to prefill than the others wait. A sequence gets a token before it is preempted."""
    sim = Simulation(running=2, slots=1, budget=3, wait=0.3, blocks=blocks)
    for adapter in "xyz":
        sim.add(adapter, prompt=40, out=8, adapter=adapter, key=adapter)
    sim.steps(1_000)
    assert sorted(sim.finished) == ["x", "y", "z"]


@pytest.mark.parametrize("is_paged", [False, True], ids=["slots", "blocks"])
@pytest.mark.parametrize("seed", range(8))
def test_every_sequence_ends_and_everything_is_freed(seed: int, is_paged: bool) -> None:
    rng = random.Random(seed)
    sim = Simulation(
        running=rng.randrange(1, 6), slots=rng.randrange(1, 4), budget=rng.randrange(8, 40), wait=0.5, preempt=0.2,
        blocks=rng.randrange(15, 30) if is_paged else 0,
    )  # fmt: skip
    live: dict[str, Sequence] = {}
    aborted = 0
    for i in range(150):
        if rng.random() < 0.6:
            adapter = rng.choice(["", "a", "b", "c", "d", "e"])
            key = rng.choice("xyz")
            live[str(i)] = sim.add(str(i), rng.randrange(1, 50), rng.randrange(1, 10), adapter, key)
        sim.step()
        for name in sim.finished:
            live.pop(name, None)
        if live and rng.random() < 0.2:
            sim.scheduler.remove(live.pop(rng.choice(list(live))))
            aborted += 1
    sim.steps(2000)
    assert not sim.scheduler.running
    assert not sim.scheduler.waiting
    assert sim.kv.used == 0
    assert all(resident.references == 0 for resident in sim.slots.loaded)
    assert len(sim.finished) == len(set(sim.finished))
