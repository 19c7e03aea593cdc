"""Judge whether a key is used as a stolen one would be, by the hour and compared with its own past.

Pure: usage records in, verdicts out, on which ``billing.abuse.enforcer`` acts.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum

from billing.catalog.abuse import REMEMBERED_HOURS, Abuse
from billing.money import divide_up, format_usd
from billing.usage import TenantId, UsageRecord

HOUR_MS = 3_600_000
KNOWN_HOURS = 24
"""The spend of a younger key is not judged: there is too little to compare it with."""
MOSTLY = (9, 10)
"""The share of an hour's answers that must be as long as its longest to be called maximal."""
UsedKey = tuple[TenantId, str]
"""A tenant and the id of its key."""


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
        tokens = record.usage.completion_tokens
        self.requests += 1
        self.list_nanos += record.list_nanos
        if tokens > self.longest:
            self.longest, self.at_longest = tokens, 0
        self.at_longest += tokens == self.longest


class Habits:
    """How each key was used in the last week, hour by hour."""

    def __init__(self) -> None:
        self._hours: defaultdict[UsedKey, dict[int, Hour]] = defaultdict(dict)

    def note(self, record: UsageRecord) -> None:
        hours = self._hours[record.tenant, record.key_id]
        hours.setdefault(record.occurred_at_ms // HOUR_MS, Hour()).add(record)

    def used_in(self, now_ms: int) -> list[UsedKey]:
        """Keys that were used in the current hour."""
        return [key for key, hours in self._hours.items() if now_ms // HOUR_MS in hours]

    def forget(self, now_ms: int) -> None:
        """Drop hours that are more than a week old."""
        first = now_ms // HOUR_MS - REMEMBERED_HOURS
        for key, hours in list(self._hours.items()):
            for hour in [hour for hour in hours if hour < first]:
                del hours[hour]
            if not hours:
                del self._hours[key]

    def verdicts(self, abuse: Abuse, addresses: Mapping[UsedKey, int], now_ms: int) -> Iterator[Verdict]:
        """Keys whose use in the current hour is unusual, with the first reason found."""
        hour = now_ms // HOUR_MS
        for tenant, key_id in self.used_in(now_ms):
            hours = self._hours[tenant, key_id]
            found = _spend(hours, hour, abuse) or _scraping(hours, hour, abuse)
            found = found or _addresses(addresses.get((tenant, key_id), 0), abuse)
            if found is not None:
                yield Verdict(tenant, key_id, *found)


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
