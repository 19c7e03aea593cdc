"""The calendar's clock: periods, expiry, caps and cooldowns take it as an argument.

Leases do not: they follow the store's own time.
"""

import time
from collections.abc import Callable

Clock = Callable[[], int]
"""Unix time in milliseconds."""
TOLERANCE_MS = 5 * 60_000
"""How far a gateway's clock may be from the store's: far more than machines that ask the time somewhere ever are."""


def now_ms() -> int:
    return time.time_ns() // 1_000_000
