"""Check that an entry of the stream is as the ledger wrote it: only such a record is exported to Dodo.

Pure: digests, no store. An entry that does not follow from its tenant's entry before it is withheld, alone. The next
may follow the digest that it bears, for a record altered where it stands, or the one before, for an inserted one.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Self

from billing.ledger.journal import Entry, UnreadableEntry
from billing.usage import TenantId


@dataclass(frozen=True, slots=True)
class Reached:
    """How far one tenant's entries were sealed: digests, either of which the next one may follow."""

    chain: str = ""
    doubted: str = ""
    """Of an entry that was withheld right behind; empty where there is none."""

    def precedes(self, entry: Entry) -> bool:
        return entry.follows(self.chain) or (self.doubted != "" and entry.follows(self.doubted))

    def to_text(self) -> str:
        return f"{self.chain}|{self.doubted}"

    @classmethod
    def from_text(cls, text: str) -> Self:
        chain, _, doubted = text.partition("|")
        return cls(chain, doubted)


@dataclass(frozen=True, slots=True)
class Withheld:
    """An entry that is not exported until it is as it was written."""

    id: str
    tenant: TenantId
    name: str
    """For people: the record's own id where that can be read."""
    behind: Reached

    def __str__(self) -> str:
        return f"{self.name} of {self.tenant} is not as it was written, or what stood before it is gone"

    def to_json(self) -> str:
        return json.dumps({"tenant": self.tenant, "name": self.name, "behind": self.behind.to_text()})

    @classmethod
    def from_json(cls, id_: str, text: str) -> Self:
        raw = json.loads(text)
        return cls(id_, TenantId(raw["tenant"]), raw["name"], Reached.from_text(raw["behind"]))


@dataclass
class CheckedEntries:
    """A window's entries, each sound or withheld."""

    reached: dict[TenantId, Reached]
    sound: list[Entry] = field(default_factory=list)
    withheld: list[Withheld] = field(default_factory=list)


def check_entries(entries: Iterable[Entry], reached: Mapping[TenantId, Reached]) -> CheckedEntries:
    """Check entries in their order. A tenant that is not in ``reached`` begins at its first entry, or, where its first
    ones were sealed before digests were looked at, at whatever stands here.
    """
    checked = CheckedEntries({})
    for entry in entries:
        known = checked.reached.get(entry.tenant) or reached.get(entry.tenant)
        before = known or Reached()
        if before.precedes(entry) or (known is None and not _may_be_first(entry)):
            checked.sound.append(entry)
            checked.reached[entry.tenant] = Reached(entry.chain)
        else:
            checked.withheld.append(Withheld(entry.id, entry.tenant, _name(entry), before))
            checked.reached[entry.tenant] = Reached(before.chain, entry.chain)
    return checked


def _may_be_first(entry: Entry) -> bool:
    try:
        return entry.number <= 1
    except UnreadableEntry:
        return True


def _name(entry: Entry) -> str:
    try:
        return str(json.loads(entry.payload)["record_id"])
    except (ValueError, KeyError, TypeError):
        return f"{entry.kind} {entry.id}"
