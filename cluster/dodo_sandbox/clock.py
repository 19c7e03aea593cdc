"""The sandbox's own time: the machine's, plus an offset that an operator moves and the store keeps.

Billing periods, renewals and the events' time window follow it. Webhook retries and signatures do
not: their receiver lives in real time.
"""

from datetime import datetime

from billing.clock import Clock
from cluster.dodo_sandbox.store import Store
from cluster.dodo_sandbox.wire import moment, to_ms

_SETTING = "clock_offset_ms"


class SandboxClock:
    def __init__(self, store: Store, real: Clock) -> None:
        self._store = store
        self._offset_ms = int(store.setting(_SETTING) or 0)
        self.real_ms = real

    def now_ms(self) -> int:
        return self.real_ms() + self._offset_ms

    def now(self) -> datetime:
        return moment(self.now_ms())

    def advance(self, delta_ms: int) -> None:
        self._offset_ms += delta_ms
        self._store.set_setting(_SETTING, str(self._offset_ms))

    def move_to(self, then: datetime) -> None:
        self.advance(to_ms(then) - self.now_ms())
