"""Which adapter lies in which slot: references, recency, pins, and adapters known to be bad.

Decides only; the bytes are moved by the loader. A slot is given away only when no running request
uses it, and never before the request it was loaded for had its turn.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from deployments.inference.request import AdapterRef

FAILURE_S = 30.0
"""How long a bad adapter is refused at once before it is read again."""
FAILURES_KEPT = 1024


@dataclass(frozen=True, slots=True)
class Load:
    """Bytes to bring into a slot."""

    ref: AdapterRef
    slot: int


@dataclass(slots=True)
class Resident:
    """An adapter that has a slot."""

    ref: AdapterRef
    slot: int
    ready: bool = False
    references: int = 0
    used: bool = False
    """Some request has run on it since it was loaded."""
    touched: int = 0
    """Count of acquisitions when it was last acquired: larger is more recent."""


class AdapterSlots:
    """Slots 0 to ``count - 1`` and the adapters in them."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = list(range(count - 1, -1, -1))
        self._residents: dict[str, Resident] = {}
        self._pinned: frozenset[str] = frozenset()
        self._wanted: list[Load] = []
        self._failures: dict[str, tuple[float, str]] = {}
        self._touches = 0

    def acquire(self, ref: AdapterRef, waited_for: Collection[str]) -> int | None:
        """Take a reference to the adapter's slot; None while it isn't there, and then its load is begun if it can be.

        ``waited_for`` are digests of waiting requests, whose slots aren't taken away unused.
        """
        resident = self._residents.get(ref.digest)
        if resident is None:
            self.prepare(ref, waited_for)
            return None
        if not resident.ready:
            return None
        self._touches += 1
        resident.references += 1
        resident.used, resident.touched = True, self._touches
        return resident.slot

    def release(self, digest: str) -> None:
        """Give a reference back."""
        resident = self._residents[digest]
        assert resident.references > 0
        resident.references -= 1

    def prepare(self, ref: AdapterRef, waited_for: Collection[str]) -> bool:
        """Begin to load an adapter if it has no slot yet and one can be had; False if none can."""
        if ref.digest in self._residents:
            return True
        if not self._free and not self._evict(waited_for):
            return False
        slot = self._free.pop()
        self._residents[ref.digest] = Resident(ref=ref, slot=slot, touched=self._touches)
        self._wanted.append(Load(ref=ref, slot=slot))
        return True

    def take_loads(self) -> list[Load]:
        """Loads begun since the last call, for the loader."""
        loads, self._wanted = self._wanted, []
        return loads

    def loaded(self, digest: str) -> None:
        """The loader has brought this adapter into its slot."""
        self._residents[digest].ready = True

    def failed(self, digest: str, reason: str, now: float) -> None:
        """The loader could not; the slot is free again and the adapter refused for a while."""
        resident = self._residents.pop(digest)
        assert resident.references == 0
        self._free.append(resident.slot)
        self._failures.pop(digest, None)
        self._failures[digest] = (now, reason)
        if len(self._failures) > FAILURES_KEPT:
            del self._failures[next(iter(self._failures))]

    def failure(self, digest: str, now: float) -> str | None:
        """Why this adapter is refused at present, if it is."""
        when, reason = self._failures.get(digest, (now - FAILURE_S, ""))
        return reason if now - when < FAILURE_S else None

    def pin(self, digests: Iterable[str]) -> None:
        """Keep these, the first of them first, in their slots once they are there; one slot stays for the others."""
        self._pinned = frozenset(list(digests)[: self.count - 1])

    def has(self, digest: str) -> bool:
        """It has a slot, loaded or being loaded."""
        return digest in self._residents

    def is_ready(self, digest: str) -> bool:
        """It has a slot and is loaded."""
        resident = self._residents.get(digest)
        return resident is not None and resident.ready

    def is_pinned(self, digest: str) -> bool:
        return digest in self._pinned

    @property
    def has_room(self) -> bool:
        """Some slot is empty."""
        return bool(self._free)

    def victims(self) -> list[Resident]:
        """Those in use that could be asked to give up their slot."""
        return [r for r in self._residents.values() if r.references and r.ref.digest not in self._pinned]

    @property
    def everyone(self) -> list[Resident]:
        """Those that are loaded or being loaded."""
        return list(self._residents.values())  # at once: other threads ask too

    @property
    def residents(self) -> list[Resident]:
        """Those that are loaded, in the order of their slots."""
        return sorted((r for r in self.everyone if r.ready), key=lambda resident: resident.slot)

    def _evict(self, waited_for: Collection[str]) -> bool:
        idle = [
            resident
            for digest, resident in self._residents.items()
            if resident.ready
            and not resident.references
            and digest not in self._pinned
            and (resident.used or digest not in waited_for)
        ]
        if not idle:
            return False
        oldest = min(idle, key=lambda resident: (resident.ref.digest in waited_for, resident.touched))
        del self._residents[oldest.ref.digest]
        self._free.append(oldest.slot)
        return True
