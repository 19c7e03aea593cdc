"""Choose what the next step computes: continuous batching over a token budget.

1. Every running sequence that decodes is in every step.
2. Prefill gets the rest of the budget, in chunks.
3. Waiting sequences are admitted key by key, the least served fairness key first, as far as KV cache and adapter slots
   allow. One whose adapter has no slot is skipped. When it has waited ``adapter_wait_s``, another adapter is drained:
   no more of its sequences are admitted. After three times as long, those that run on it are preempted.
4. A key that waits ``preempt_after_s`` to be admitted preempts a sequence of a key that runs at least two more.
5. Where decodes outgrow the KV cache, the last admitted is preempted. The first admitted always goes on: alone it fits.

A preempted sequence keeps its tokens and waits first in its key's queue; its KV cache is computed again.
No torch, no clock, no thread.
"""

from collections import Counter, deque
from collections.abc import Iterator
from itertools import chain
from typing import Protocol

from deployments.inference.fairness import TokenCounters
from deployments.inference.native.registry import AdapterRegistry
from deployments.inference.native.sequence import ScheduledSequence, Sequence
from deployments.inference.request import AdapterRef

PREEMPT_PATIENCE = 3
"""A drained adapter's sequences are preempted once another one has waited this many times ``adapter_wait_s``."""


class KvAllocator(Protocol):
    """Which part of the KV cache belongs to which sequence. Any sequence fits when no other runs."""

    def can_allocate(self, sequence: Sequence) -> bool:
        """True if ``allocate`` would succeed now."""

    def allocate(self, sequence: Sequence) -> None:
        """Give the sequence room for its tokens, and set how many of them a prefix cache hit makes computed already."""

    def try_append(self, sequence: Sequence) -> bool:
        """Give it room for its newest token; False if there is none."""

    def free(self, sequence: Sequence, is_valid: bool) -> None:
        """Take the room back. If it is valid, later sequences may reuse what was computed in it."""


class Scheduler:
    """Owns every sequence from ``add`` to ``remove``. Times are seconds on the caller's clock."""

    def __init__(
        self,
        kv: KvAllocator,
        adapters: AdapterRegistry,
        max_batched_tokens: int,
        adapter_wait_s: float,
        preempt_after_s: float,
    ) -> None:
        self._kv = kv
        self._adapters = adapters
        self._max_batched_tokens = max_batched_tokens
        self._adapter_wait_s = adapter_wait_s
        self._preempt_after_s = preempt_after_s
        self._waiting: dict[str, deque[Sequence]] = {}
        """By fairness key, in order of arrival."""
        self._running: dict[Sequence, None] = {}
        """In order of admission."""
        self._wanted: Counter[str] = Counter()
        """Adapter digest to its number of waiting sequences."""
        self._counters = TokenCounters()
        self.preemptions = 0

    @property
    def running(self) -> list[Sequence]:
        return list(self._running)

    @property
    def waiting(self) -> list[Sequence]:
        return list(chain.from_iterable(self._waiting.values()))

    def add(self, sequence: Sequence, now: float) -> None:
        """Queue a new sequence, and load its adapter if a slot is free."""
        self._counters.enter(sequence.request.fairness_key, sequence.request.fairness_weight)
        if sequence.adapter and self._adapters.has_free_slot:
            self._adapters.prefetch(sequence.adapter, self._wanted)
        self._enqueue(sequence, now)

    def remove(self, sequence: Sequence, is_valid: bool = True) -> None:
        """Drop a sequence that has ended, and free what it holds. Not valid: its KV cache may not be reused."""
        if sequence in self._running:
            self._free(sequence, is_valid)
        else:
            self._dequeue(sequence)
        self._counters.leave(sequence.request.fairness_key)

    def prefetch(self, ref: AdapterRef) -> None:
        """Load an adapter that no sequence waits for yet, if a slot can be had."""
        self._adapters.prefetch(ref, self._wanted)

    def schedule(self, now: float) -> list[ScheduledSequence]:
        """Choose the next step's batch, sorted by adapter slot, sequences of the base model last."""
        blocked = self._drain_adapters(now)
        self._preempt_for_fairness(now)
        self._append_slots(now)
        scheduled = [ScheduledSequence(sequence, 1) for sequence in self._running if sequence.is_decoding]
        budget = self._max_batched_tokens - len(scheduled)
        assert budget >= 0
        prefills = [sequence for sequence in self._running if not sequence.is_decoding]
        for sequence in chain(prefills, self._admissions(now, blocked)):
            count = min(budget, len(sequence.token_ids) - sequence.computed_tokens)
            scheduled.append(ScheduledSequence(sequence, count))
            budget -= count
            if budget == 0:
                break
        return sorted(scheduled, key=_batch_order)

    def mark_computed(self, scheduled: ScheduledSequence) -> None:
        """Record that a step has computed this; where a token is sampled, charge it to the fairness key."""
        if scheduled.is_sampled:
            self._counters.charge(scheduled.sequence.request.fairness_key, completion_tokens=1)
        scheduled.sequence.computed_tokens += scheduled.count

    def _admissions(self, now: float, blocked: set[str]) -> Iterator[Sequence]:
        """Admit waiting sequences one by one, for as long as the caller has budget for them.

        ``blocked`` are the digests of adapters that admit none in this step; those without a slot are added.
        """
        while (sequence := self._admit_next(now, blocked)) is not None:
            yield sequence

    def _admit_next(self, now: float, blocked: set[str]) -> Sequence | None:
        """Admit one. Those behind one that does not fit wait too: else smaller ones could overtake it for ever."""
        for sequence in self._by_turn(now):
            if sequence.digest not in blocked:
                if not self._kv.can_allocate(sequence):
                    return None
                if self._try_admit(sequence, blocked, now):
                    return sequence
        return None

    def _by_turn(self, now: float) -> Iterator[Sequence]:
        """Those that waited too long for an adapter slot, then key by key, the least served first."""
        yield from sorted(self._starved(now, self._adapter_wait_s), key=lambda sequence: sequence.blocked_since or 0.0)
        for key in sorted(self._waiting, key=self._counters.served):
            yield from self._waiting[key]

    def _try_admit(self, sequence: Sequence, blocked: set[str], now: float) -> bool:
        """Move a waiting sequence to the running ones, unless its adapter is not resident."""
        if sequence.adapter:
            slot = self._adapters.acquire(sequence.adapter, self._wanted)
            if slot is None:
                blocked.add(sequence.digest)
                if not self._adapters.has(sequence.digest) and sequence.blocked_since is None:
                    sequence.blocked_since = now
                return False
            sequence.adapter_slot = slot
        self._dequeue(sequence)
        self._kv.allocate(sequence)
        self._running[sequence] = None
        sequence.tokens_at_admission = len(sequence.token_ids)
        if not sequence.was_admitted:
            sequence.was_admitted = True
            computed = sequence.prompt_tokens - sequence.cached_tokens
            self._counters.charge(sequence.request.fairness_key, prompt_tokens=computed)
        return True

    def _drain_adapters(self, now: float) -> set[str]:
        """Return the digests that admit no more, so that their slots fall to adapters that waited too long for one.

        They are as many as wait, those with the least work left first. For those that wait far too long, the
        sequences that still run on them are preempted.
        """
        starved = self._starved_adapters(now, self._adapter_wait_s)
        if not starved:
            return set()
        tokens_left: Counter[str] = Counter()
        for sequence in self._running:
            tokens_left[sequence.digest] += sequence.tokens_left
        drained = sorted(self._adapters.evictable_in_use, key=lambda digest: (tokens_left[digest], digest))
        overdue = set(drained[: len(self._starved_adapters(now, PREEMPT_PATIENCE * self._adapter_wait_s))])
        # Each gets a token before it is preempted: else two long prompts would preempt each other for ever.
        for sequence in [one for one in self._running if one.digest in overdue and one.has_progressed]:
            self._preempt(sequence, now)
        return set(drained[: len(starved)])

    def _starved_adapters(self, now: float, wait_s: float) -> set[str]:
        """Digests of the adapters that have no slot, and for which a sequence has waited this long."""
        return {one.digest for one in self._starved(now, wait_s) if not self._adapters.has(one.digest)}

    def _starved(self, now: float, wait_s: float) -> list[Sequence]:
        return [one for one in self.waiting if one.blocked_since is not None and now - one.blocked_since >= wait_s]

    def _preempt_for_fairness(self, now: float) -> None:
        """If the least served key cannot be admitted, preempt a sequence of the key that runs most for its weight."""
        ready = [
            key
            for key, queue in self._waiting.items()
            if now - queue[0].waiting_since >= self._preempt_after_s
            and (not queue[0].adapter or self._adapters.is_loaded(queue[0].digest))
        ]
        if not ready:
            return
        key = min(ready, key=self._counters.served)
        if self._kv.can_allocate(self._waiting[key][0]):
            return
        running = Counter(sequence.request.fairness_key for sequence in self._running)
        largest = max(running, key=lambda other: (running[other] - 1) / self._counters.weight(other))
        share_after = (running[key] + 1) / self._counters.weight(key)
        is_fairer = share_after <= (running[largest] - 1) / self._counters.weight(largest)
        if is_fairer and self._counters.served(key) < self._counters.served(largest):
            self._preempt(next(s for s in reversed(self._running) if s.request.fairness_key == largest), now)

    def _append_slots(self, now: float) -> None:
        """Give each running sequence room for its newest token; where there is none, preempt the last admitted."""
        for sequence in list(self._running):
            while sequence in self._running and not self._kv.try_append(sequence):
                self._preempt(next(reversed(self._running)), now)

    def _preempt(self, sequence: Sequence, now: float) -> None:
        """Put it back, first in its key's queue. The prefix cache may still have what it computed."""
        self._free(sequence, is_valid=True)
        sequence.computed_tokens = 0
        self._enqueue(sequence, now, first=True)
        self.preemptions += 1

    def _free(self, sequence: Sequence, is_valid: bool) -> None:
        del self._running[sequence]
        self._kv.free(sequence, is_valid)
        if sequence.adapter:
            self._adapters.release(sequence.digest)
        sequence.adapter_slot = -1

    def _enqueue(self, sequence: Sequence, now: float, first: bool = False) -> None:
        queue = self._waiting.setdefault(sequence.request.fairness_key, deque())
        if first:
            queue.appendleft(sequence)
        else:
            queue.append(sequence)
        sequence.waiting_since, sequence.blocked_since = now, None
        if sequence.adapter:
            self._wanted[sequence.digest] += 1

    def _dequeue(self, sequence: Sequence) -> None:
        key = sequence.request.fairness_key
        self._waiting[key].remove(sequence)
        if not self._waiting[key]:
            del self._waiting[key]
        if sequence.adapter:
            self._wanted[sequence.digest] -= 1
            if not self._wanted[sequence.digest]:
                del self._wanted[sequence.digest]


def _batch_order(scheduled: ScheduledSequence) -> tuple[bool, int, int]:
    sequence = scheduled.sequence
    return sequence.adapter_slot < 0, sequence.adapter_slot, sequence.kv_slot
