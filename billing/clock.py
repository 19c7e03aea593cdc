"""The clock that periods, expiry, caps and cooldowns are reckoned by, and the months of the calendar.

It is passed in as an argument. Leases of holds follow the store's own time instead.
"""

import time
from collections.abc import Callable
from datetime import UTC, datetime

from dateutil.relativedelta import relativedelta

Clock = Callable[[], int]
"""Returns Unix time in milliseconds."""
TOLERANCE_MS = 5 * 60_000
"""How far a gateway's clock may be from the store's: far more than machines that synchronise their clocks ever are."""


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def month_of(at_ms: int) -> tuple[datetime, datetime]:
    """The calendar month in UTC that holds this moment: its start and the start of the next."""
    moment = datetime.fromtimestamp(at_ms // 1_000, UTC)
    start = moment + relativedelta(day=1, hour=0, minute=0, second=0, microsecond=0)
    return start, start + relativedelta(months=1)


def month_start_ms(at_ms: int) -> int:
    """When the month that holds this moment began."""
    return unix_ms(month_of(at_ms)[0])


def iso(at_ms: int) -> str:
    """A moment in Unix milliseconds as ISO 8601 in UTC, to the second."""
    return datetime.fromtimestamp(at_ms // 1_000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def unix_ms(moment: datetime) -> int:
    """A moment of whole seconds in Unix milliseconds."""
    return int(moment.timestamp()) * 1_000
