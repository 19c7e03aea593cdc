"""A failpoint: a named point in the code where a process kills itself, the n-th time that it gets there."""

import os
import signal
from dataclasses import dataclass


@dataclass
class Failpoint:
    """Kills this process at ``point``, on the ``passes``-th call. An empty ``point`` never kills."""

    point: str = ""
    passes: int = 1

    def reach(self, point: str) -> None:
        """SIGKILL at once, so that nothing after this line runs: no handler, no ``finally``, no flush."""
        if point != self.point:
            return
        self.passes -= 1
        if self.passes == 0:
            os.kill(os.getpid(), signal.SIGKILL)
