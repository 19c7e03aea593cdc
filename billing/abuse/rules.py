"""Judge whether a key is used as a stolen one would be, by the hour and compared with its own past.

A key that was rotated goes on with the past of the one it replaced. Pure: usage records in, verdicts out, on which
``billing.abuse.enforcer`` acts.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum

from billing.abuse.addresses import UsedKey
from billing.catalog.abuse import REMEMBERED_HOURS, Abuse
from billing.money import divide_up, format_usd
from billing.usage import TenantId, UsageRecord

HOUR_MS = 3_600_000
KNOWN_HOURS = 24
"""The spend of a younger key is not judged: there is too little to compare it with."""
MOSTLY = (9, 10)
"""The share of an hour's answers that must be as long as its longest to be called maximal."""


class Reason(StrEnum):
    SPEND = "unusual_spend"
    SCRAPING = "maximal_outputs"
    ADDRESSES = "many_addresses"


@dataclass(frozen=True, slots=True)
class Verdict:
    """A key that should be throttled, and why, in words for its owner."""

    tenant: TenantId
    key_id: str
    reason: Reason
    detail: str


@dataclass(slots=True)
class Hour:
    """One key's use in one hour."""

    requests: int = 0
    list_nanos: int = 0
    """At list price: what a requests bucket covered counts too."""
    longest: int = 0
    at_longest: int = 0
    """Answers as long as the longest."""

    def add(self, record: UsageRecord) -> None:
        self.join(Hour(1, record.list_nanos, record.usage.completion_tokens, 1))

    def join(self, other: "Hour") -> None:
        """Add another key's use in the same hour."""
        self.requests += other.requests
        self.list_nanos += other.list_nanos
        if other.longest > self.longest:
            self.longest, self.at_longest = other.longest, 0
        self.at_longest += other.at_longest if other.longest == self.longest else 0


class Habits:
    """How each key was used in the last week, hour by hour."""

    def __init__(self) -> None:
        self._hours: defaultdict[UsedKey, dict[int, Hour]] = defaultdict(dict)
        self._counted_as: dict[UsedKey, UsedKey] = {}

    def note(self, record: UsageRecord) -> None:
        hours = self._hours[record.tenant, record.key_id]
        hours.setdefault(record.occurred_at_ms // HOUR_MS, Hour()).add(record)

    def used_in(self, now_ms: int) -> list[UsedKey]:
        """Keys that were used in the current hour."""
        return [key for key, hours in self._hours.items() if now_ms // HOUR_MS in hours]

    def count_as(self, key: UsedKey, first: UsedKey) -> None:
        """Join what a key did and does with what ``first`` did, whose successor it is, or itself."""
        self._counted_as[key] = first

    def unplaced(self, now_ms: int) -> set[TenantId]:
        """Tenants that use a key now, and have keys of which it is not known what they are counted as."""
        used = {tenant for tenant, _ in self.used_in(now_ms)}
        return {key[0] for key in self._hours.keys() - self._counted_as.keys() if key[0] in used}

    def keys_of(self, tenant: TenantId) -> list[UsedKey]:
        """A tenant's keys that were used in the last week."""
        return [key for key in self._hours if key[0] == tenant]

    def rows_in(self, now_ms: int) -> dict[UsedKey, list[UsedKey]]:
        """The keys used in the current hour, those that are counted as one together, by that one."""
        rows: defaultdict[UsedKey, list[UsedKey]] = defaultdict(list)
        for key in self.used_in(now_ms):
            rows[self._first_of(key)].append(key)
        return dict(rows)

    def _first_of(self, key: UsedKey) -> UsedKey:
        return self._counted_as.get(key, key)

    def forget(self, now_ms: int) -> None:
        """Drop hours that are more than a week old."""
        first = now_ms // HOUR_MS - REMEMBERED_HOURS
        for key, hours in list(self._hours.items()):
            for hour in [hour for hour in hours if hour < first]:
                del hours[hour]
            if not hours:
                del self._hours[key]
                self._counted_as.pop(key, None)

    def verdicts(self, abuse: Abuse, addresses: Mapping[UsedKey, int], now_ms: int) -> Iterator[Verdict]:
        """Keys whose use in the current hour is unusual, with the first reason found.

        Keys that are counted as one are judged together; ``addresses`` has their number under that one.
        """
        hour, rows = now_ms // HOUR_MS, self.rows_in(now_ms)
        joined: dict[UsedKey, defaultdict[int, Hour]] = {first: defaultdict(Hour) for first in rows}
        for key, hours in self._hours.items():
            if (row := joined.get(self._first_of(key))) is not None:
                for at, one in hours.items():
                    row[at].join(one)
        for first, keys in rows.items():
            found = _spend(joined[first], hour, abuse) or _scraping(joined[first], hour, abuse)
            found = found or _addresses(addresses.get(first, 0), abuse)
            if found is not None:
                yield from (Verdict(tenant, key_id, *found) for tenant, key_id in keys)


def _spend(hours: Mapping[int, Hour], now: int, abuse: Abuse) -> tuple[Reason, str] | None:
    before = [one.list_nanos for at, one in hours.items() if now - REMEMBERED_HOURS <= at < now]
    spent = hours[now].list_nanos
    if min(hours) > now - KNOWN_HOURS or spent < abuse.spend_at_least:
        return None
    if spent * len(before) <= abuse.spend_factor * sum(before):
        return None
    mean = divide_up(sum(before), len(before))
    detail = f"${format_usd(spent, 2)} this hour, and ${format_usd(mean, 2)} in a busy hour of the last week"
    return Reason.SPEND, detail


def _scraping(hours: Mapping[int, Hour], now: int, abuse: Abuse) -> tuple[Reason, str] | None:
    for at in range(now - abuse.long_hours + 1, now + 1):
        hour = hours.get(at)
        if hour is None or hour.requests < abuse.long_requests or hour.longest < abuse.long_tokens:
            return None
        if hour.at_longest * MOSTLY[1] < hour.requests * MOSTLY[0]:
            return None
    longest = hours[now].longest
    return Reason.SCRAPING, f"nearly all answers of the last {abuse.long_hours} hours are {longest} tokens long"


def _addresses(count: int, abuse: Abuse) -> tuple[Reason, str] | None:
    if count <= abuse.addresses:
        return None
    return Reason.ADDRESSES, f"about {count} client addresses this hour"
