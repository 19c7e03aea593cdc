"""What a key may spend within an hour, a day or a month of the calendar in UTC.

What was spent in a window is counted in the store, by the scripts that hold and settle.
"""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum

from billing.clock import month_of, unix_ms
from billing.money import Nanos
from billing.tenants.tenant import ApiKey


class Window(StrEnum):
    HOUR = "hour"
    DAY = "day"
    MONTH = "month"


@dataclass(frozen=True, slots=True)
class SpendCap:
    """The most that requests that were held in one window may cost, including what they still hold."""

    window: Window
    start_ms: int
    nanos: Nanos


def caps_of(key: ApiKey, hourly: Nanos, now_ms: int) -> tuple[SpendCap, ...]:
    """What a key may spend in the windows that ``now_ms`` lies in; ``hourly``: the cap while it is throttled."""
    while_throttled = hourly if key.throttled else None
    caps = ((Window.HOUR, while_throttled), (Window.DAY, key.daily_cap), (Window.MONTH, key.monthly_cap))
    return tuple(cap_at(window, nanos, now_ms) for window, nanos in caps if nanos is not None)


def cap_at(window: Window, nanos: Nanos, now_ms: int) -> SpendCap:
    """The cap on the window that ``now_ms`` lies in."""
    return SpendCap(window, unix_ms(_start(window, now_ms)), nanos)


def end_ms(window: Window, start_ms: int) -> int:
    """When the window that begins at ``start_ms`` is over."""
    start = datetime.fromtimestamp(start_ms // 1000, UTC)
    if window is Window.MONTH:
        return unix_ms(month_of(start_ms)[1])
    return unix_ms(start + (timedelta(days=1) if window is Window.DAY else timedelta(hours=1)))


def _start(window: Window, now_ms: int) -> datetime:
    now = datetime.fromtimestamp(now_ms // 1000, UTC).replace(minute=0, second=0)
    if window is Window.MONTH:
        return month_of(now_ms)[0]
    return now.replace(hour=0) if window is Window.DAY else now
