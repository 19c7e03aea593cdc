"""The adapter registry: which adapter is in which slot, who uses it, which are pinned and which were found bad.

Decides only; the ``Loader`` moves the bytes. A slot is taken from an adapter only while no running sequence uses it,
and never before a sequence that waited for the adapter has run.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from deployments.inference.request import AdapterRef

FAILURE_TTL_S = 30.0
"""How long an adapter that failed to load is rejected at once, before it is read again."""
MAX_FAILURES = 1024
"""Failures remembered; the oldest is forgotten first."""


@dataclass(frozen=True, slots=True)
class Load:
    """An adapter to be brought into a slot."""

    ref: AdapterRef
    slot: int


@dataclass(slots=True)
class Resident:
    """An adapter that has a slot, loaded or being loaded."""

    ref: AdapterRef
    slot: int
    is_loaded: bool = False
    references: int = 0
    """Running sequences that use it."""
    was_used: bool = False
    """A sequence has run on it since it was loaded."""
    last_use: int = 0
    """The registry's count of acquisitions when it was last acquired; larger is more recent."""


class AdapterRegistry:
    """Slots 0 to ``count - 1`` and the adapters in them, by digest."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = list(range(count - 1, -1, -1))
        self._residents: dict[str, Resident] = {}
        self._pinned: frozenset[str] = frozenset()
        self._loads: list[Load] = []
        self._failures: dict[str, tuple[float, str]] = {}
        """Digest to when and why it failed to load."""
        self._uses = 0

    def acquire(self, ref: AdapterRef, wanted: Collection[str]) -> int | None:
        """Add a reference to the adapter and return its slot; None if it is not loaded, after ``prefetch``."""
        resident = self._residents.get(ref.digest)
        if resident is None:
            self.prefetch(ref, wanted)
            return None
        if not resident.is_loaded:
            return None
        self._uses += 1
        resident.references += 1
        resident.was_used, resident.last_use = True, self._uses
        return resident.slot

    def release(self, digest: str) -> None:
        """Drop a reference."""
        resident = self._residents[digest]
        assert resident.references > 0
        resident.references -= 1

    def prefetch(self, ref: AdapterRef, wanted: Collection[str]) -> bool:
        """Give the adapter a slot and request its load, unless it has one; False if no slot can be had.

        ``wanted`` are the digests that sequences wait for: those are not evicted before they were used.
        """
        if ref.digest in self._residents:
            return True
        if not self._free and not self._evict(wanted):
            return False
        slot = self._free.pop()
        self._residents[ref.digest] = Resident(ref=ref, slot=slot, last_use=self._uses)
        self._loads.append(Load(ref=ref, slot=slot))
        return True

    def take_loads(self) -> list[Load]:
        """The loads requested since the last call, for the loader."""
        loads, self._loads = self._loads, []
        return loads

    def mark_loaded(self, digest: str) -> None:
        self._residents[digest].is_loaded = True

    def mark_failed(self, digest: str, reason: str, now: float) -> None:
        """Free the slot, and remember for ``FAILURE_TTL_S`` why the adapter could not be loaded."""
        resident = self._residents.pop(digest)
        assert resident.references == 0
        self._free.append(resident.slot)
        self._failures.pop(digest, None)
        self._failures[digest] = (now, reason)
        if len(self._failures) > MAX_FAILURES:
            del self._failures[next(iter(self._failures))]

    def failure(self, digest: str, now: float) -> str | None:
        """Why this adapter is rejected at present, if it is."""
        when, reason = self._failures.get(digest, (now - FAILURE_TTL_S, ""))
        return reason if now - when < FAILURE_TTL_S else None

    def pin(self, digests: Iterable[str]) -> None:
        """Never evict these, as far as slots go: the first come first, and one slot always stays for others."""
        self._pinned = frozenset(list(digests)[: self.count - 1])

    def has(self, digest: str) -> bool:
        """True if it has a slot, loaded or being loaded."""
        return digest in self._residents

    def is_loaded(self, digest: str) -> bool:
        resident = self._residents.get(digest)
        return resident is not None and resident.is_loaded

    def is_pinned(self, digest: str) -> bool:
        return digest in self._pinned

    @property
    def has_free_slot(self) -> bool:
        return bool(self._free)

    @property
    def evictable_in_use(self) -> list[str]:
        """Digests that running sequences use and that are not pinned: they can be evicted once those end."""
        return [digest for digest, one in self._residents.items() if one.references and digest not in self._pinned]

    @property
    def residents(self) -> list[Resident]:
        """All that have a slot. Any thread may ask."""
        return list(self._residents.values())

    @property
    def loaded(self) -> list[Resident]:
        """Those that are loaded, in the order of their slots. Any thread may ask."""
        return sorted((one for one in self.residents if one.is_loaded), key=lambda resident: resident.slot)

    def _evict(self, wanted: Collection[str]) -> bool:
        """Free the slot of the least recently used adapter that may go, those not wanted first."""
        idle = [
            resident
            for digest, resident in self._residents.items()
            if resident.is_loaded
            and not resident.references
            and digest not in self._pinned
            and (resident.was_used or digest not in wanted)
        ]
        if not idle:
            return False
        evicted = min(idle, key=lambda resident: (resident.ref.digest in wanted, resident.last_use))
        del self._residents[evicted.ref.digest]
        self._free.append(evicted.slot)
        return True
