"""What the next step computes: continuous batching over a token budget. Pure: no torch, no clock, no thread.

Every running decode is in every step; prefill gets the rest of the budget in chunks; waiting requests
enter by fairness as far as KV memory and adapter slots allow. A request blocked by its adapter is passed
over, not waited for, until it has waited long enough for another adapter to give up its slot. A running
request can be preempted: it waits again with the tokens it has, and what it held is computed anew. Where decodes
outgrow the KV memory that befalls the last admitted; the first admitted always goes on, as it fits alone.
"""

from collections import Counter, deque
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from itertools import chain
from typing import Protocol

from deployments.inference.fairness import TokenCounters
from deployments.inference.native.sequence import Sequence, Work
from deployments.inference.native.slots import AdapterSlots
from deployments.inference.request import AdapterRef

PREEMPT_PATIENCE = 3
"""An adapter that takes no new requests is set back once somebody waited this many times its patience for it."""


class KvMemory(Protocol):
    """Where sequences keep their keys and values. Any one of them fits where no other is."""

    def fits(self, sequence: Sequence) -> bool:
        """It can be acquired now."""

    def acquire(self, sequence: Sequence) -> None:
        """Give the sequence room for its tokens, and set how many of them are computed already."""

    def grow(self, sequence: Sequence) -> bool:
        """Give it room for its newest token; False if there is none."""

    def release(self, sequence: Sequence, sound: bool) -> None:
        """Take the room back; what is in it may be used again if it is sound, as far as a token was sampled over it."""


class Scheduler:
    """Owns every sequence from ``add`` to ``remove``. Times are seconds on the caller's clock."""

    def __init__(
        self,
        kv: KvMemory,
        slots: AdapterSlots,
        max_batched_tokens: int,
        adapter_wait_s: float,
        preempt_after_s: float,
    ) -> None:
        self._kv = kv
        self._slots = slots
        self._budget = max_batched_tokens
        self._adapter_wait_s = adapter_wait_s
        self._preempt_after_s = preempt_after_s
        self._waiting: dict[str, deque[Sequence]] = {}
        """By fairness key, in order of arrival."""
        self._running: dict[Sequence, None] = {}
        """In order of admission."""
        self._waited_for: Counter[str] = Counter()
        """Digest to the number of waiting requests that need it."""
        self._counters = TokenCounters()
        self.preemptions = 0

    def add(self, sequence: Sequence, now: float) -> None:
        """A request has come; its adapter begins to load if there is room."""
        self._counters.enter(sequence.request.fairness_key, sequence.request.fairness_weight)
        if sequence.adapter and self._slots.has_room:
            self._slots.prepare(sequence.adapter, self._waited_for)
        self._queue(sequence, now)

    def remove(self, sequence: Sequence, sound: bool = True) -> None:
        """A request has ended, for whatever reason: everything it held is free again.

        Not ``sound``: what it computed is not to be trusted.
        """
        if sequence in self._running:
            self._release(sequence, sound)
        else:
            self._unqueue(sequence)
        self._counters.leave(sequence.request.fairness_key)

    def schedule(self, now: float) -> list[Work]:
        """Choose this step's work: the rows of one adapter beside each other, those of the base model last."""
        blocked = self._draining(now)
        self._make_room(now)
        self._grow(now)
        budget = self._budget
        work = []
        for sequence in self._running:
            if sequence.decoding:
                work.append(Work(sequence, 1))
                budget -= 1
        assert budget >= 0
        prefills = [sequence for sequence in self._running if not sequence.decoding]
        for sequence in chain(prefills, self._admissions(now, blocked)):
            count = min(budget, len(sequence.token_ids) - sequence.computed)
            work.append(Work(sequence, count))
            budget -= count
            if budget == 0:
                break
        return sorted(work, key=_row_order)

    def computed(self, work: Work) -> None:
        """A step has computed this work; where it completed, a token is generated."""
        if work.completes:
            self._counters.charge(work.sequence.request.fairness_key, completion_tokens=1)
        work.sequence.computed += work.count

    def prepare(self, ref: AdapterRef) -> None:
        """Load an adapter that nobody waits for yet, if a slot can be had."""
        self._slots.prepare(ref, self._waited_for)

    @property
    def running(self) -> list[Sequence]:
        return list(self._running)

    @property
    def waiting(self) -> list[Sequence]:
        return list(chain.from_iterable(self._waiting.values()))

    def _admissions(self, now: float, blocked: set[str]) -> Iterator[Sequence]:
        """Take in waiting sequences one by one, for as long as the caller has budget for them."""
        while (sequence := self._next(now, blocked)) is not None:
            yield sequence

    def _next(self, now: float, blocked: set[str]) -> Sequence | None:
        """Admit one. Behind one that does not fit nobody is: smaller ones could keep it waiting for ever."""
        for sequence in self._by_turn(now):
            if sequence.digest not in blocked:
                if not self._kv.fits(sequence):
                    return None
                if self._admit(sequence, blocked, now):
                    return sequence
        return None

    def _by_turn(self, now: float) -> Iterator[Sequence]:
        """Those that an adapter slot has kept waiting too long, then key by key, least served first."""
        yield from sorted(self._starved(now), key=_blocked_since)
        for key in sorted(self._waiting, key=self._counters.served):
            yield from self._waiting[key]

    def _admit(self, sequence: Sequence, blocked: set[str], now: float) -> bool:
        if sequence.adapter:
            slot = self._slots.acquire(sequence.adapter, self._waited_for)
            if slot is None:
                blocked.add(sequence.digest)
                if not self._slots.has(sequence.digest) and sequence.blocked_since is None:
                    sequence.blocked_since = now
                return False
            sequence.adapter_slot = slot
        self._unqueue(sequence)
        self._kv.acquire(sequence)
        self._running[sequence], sequence.tokens_before = None, len(sequence.token_ids)
        if not sequence.admitted:
            sequence.admitted = True
            self._counters.charge(sequence.request.fairness_key, prompt_tokens=sequence.prompt_tokens - sequence.cached)
        return True

    def _starved(self, now: float) -> list[Sequence]:
        return [
            s for s in self.waiting if s.blocked_since is not None and now - s.blocked_since >= self._adapter_wait_s
        ]

    def _draining(self, now: float) -> set[str]:
        """Adapters that take no new requests, so that their slots fall to starved ones: those soonest done."""
        homeless = {s.digest for s in self._starved(now) if not self._slots.has(s.digest)}
        if not homeless:
            return set()
        work_left: Counter[str] = Counter()
        for sequence in self._running:
            work_left[sequence.digest] += sequence.tokens_left
        victims = sorted((r.ref.digest for r in self._slots.victims()), key=lambda digest: (work_left[digest], digest))
        self._set_back(victims, now)
        return set(victims[: len(homeless)])

    def _set_back(self, victims: Seq[str], now: float) -> None:
        """For those that wait far too long: preempt what still runs on the adapters that should have made way."""
        limit = PREEMPT_PATIENCE * self._adapter_wait_s
        waited = [s for s in self._starved(now) if now - _blocked_since(s) >= limit]
        homeless = {s.digest for s in waited if not self._slots.has(s.digest)}
        taken = set(victims[: len(homeless)])
        # Who got no token since it was taken in goes on until it has one: else long ones set each other back for ever.
        for sequence in [sequence for sequence in self._running if sequence.digest in taken and sequence.got_on]:
            self._preempt(sequence, now)

    def _make_room(self, now: float) -> None:
        """If the least served key waits for a place in the batch, take one from a key that holds two more than it."""
        ready = [
            key
            for key, queue in self._waiting.items()
            if now - queue[0].waiting_since >= self._preempt_after_s
            and (not queue[0].adapter or self._slots.is_ready(queue[0].digest))
        ]
        if not ready:
            return
        key = min(ready, key=self._counters.served)
        if self._kv.fits(self._waiting[key][0]):
            return
        places = Counter(sequence.request.fairness_key for sequence in self._running)
        richest = max(places, key=lambda other: (places[other] - 1) / self._counters.weight(other))
        share = (places[key] + 1) / self._counters.weight(key)
        is_fairer = share <= (places[richest] - 1) / self._counters.weight(richest)
        if is_fairer and self._counters.served(key) < self._counters.served(richest):
            self._preempt(next(s for s in reversed(self._running) if s.request.fairness_key == richest), now)

    def _grow(self, now: float) -> None:
        """Room for the decodes' newest tokens; where it runs out, the last admitted makes some."""
        for sequence in list(self._running):
            while sequence in self._running and not self._kv.grow(sequence):
                self._preempt(next(reversed(self._running)), now)

    def _preempt(self, sequence: Sequence, now: float) -> None:
        """Back to the head of its key's queue; the prefix cache may still hold what it computed."""
        self._release(sequence, sound=True)
        sequence.computed = 0
        self._queue(sequence, now, first=True)
        self.preemptions += 1

    def _release(self, sequence: Sequence, sound: bool) -> None:
        del self._running[sequence]
        self._kv.release(sequence, sound)
        if sequence.adapter:
            self._slots.release(sequence.digest)
        sequence.adapter_slot = -1

    def _queue(self, sequence: Sequence, now: float, first: bool = False) -> None:
        queue = self._waiting.setdefault(sequence.request.fairness_key, deque())
        if first:
            queue.appendleft(sequence)
        else:
            queue.append(sequence)
        sequence.waiting_since, sequence.blocked_since = now, None
        if sequence.adapter:
            self._waited_for[sequence.digest] += 1

    def _unqueue(self, sequence: Sequence) -> None:
        key = sequence.request.fairness_key
        self._waiting[key].remove(sequence)
        if not self._waiting[key]:
            del self._waiting[key]
        if sequence.adapter:
            self._waited_for[sequence.digest] -= 1
            if not self._waited_for[sequence.digest]:
                del self._waited_for[sequence.digest]


def _row_order(work: Work) -> tuple[bool, int, int]:
    return work.sequence.adapter_slot < 0, work.sequence.adapter_slot, work.sequence.kv_slot


def _blocked_since(sequence: Sequence) -> float:
    assert sequence.blocked_since is not None
    return sequence.blocked_since
