"""A clock that stands still until a test moves it."""

from billing.clock import now_ms


class SteppedClock:
    """A clock that starts at ``start_ms``, or now."""

    def __init__(self, start_ms: int | None = None) -> None:
        self.now_ms = now_ms() if start_ms is None else start_ms

    def __call__(self) -> int:
        return self.now_ms

    def move(self, ms: int) -> None:
        self.now_ms += ms
