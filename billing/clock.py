"""The calendar's clock: periods, expiry, caps and cooldowns take it as an argument.

Leases do not: they follow the store's own time.
"""

import time
from collections.abc import Callable

Clock = Callable[[], int]
"""Unix time in milliseconds."""


def now_ms() -> int:
    return time.time_ns() // 1_000_000
