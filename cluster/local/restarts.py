"""How often a child that has ended may be started again, and when."""

from collections import defaultdict

RESTARTS_MAX = 10
"""Of one child within ``WINDOW_S``; one more, and the run has failed."""
WINDOW_S = 3_600.0
WAIT_MAX_S = 60.0


class Restarts:
    """The restarts of each child within the last hour, by a clock in seconds that the caller reads.

    The first is at once, and each later one waits about twice as long, so that a fault of some minutes is outlived.
    """

    def __init__(self) -> None:
        self._times: dict[str, list[float]] = defaultdict(list)

    def is_due(self, name: str, now_s: float) -> bool:
        """Whether the child may be started again now, or has to wait a little."""
        times = self._recent(name, now_s)
        return not times or now_s - times[-1] >= min(2.0 ** len(times) - 1, WAIT_MAX_S)

    def note(self, name: str, now_s: float) -> int:
        """Note a restart; returns how many there were within the last hour."""
        times = self._recent(name, now_s)
        times.append(now_s)
        return len(times)

    def _recent(self, name: str, now_s: float) -> list[float]:
        times = self._times[name] = [at for at in self._times[name] if now_s - at < WINDOW_S]
        return times
