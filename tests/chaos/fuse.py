"""Where a process of a scenario kills itself: at a named point of its own course, the n-th time it comes there."""

import os
import signal
from dataclasses import dataclass


@dataclass
class Fuse:
    """``point`` empty: it never burns."""

    point: str = ""
    passes: int = 1

    def reach(self, point: str) -> None:
        """SIGKILL at once, so that nothing after this line runs: no handler, no ``finally``, no flush."""
        if point != self.point:
            return
        self.passes -= 1
        if self.passes == 0:
            os.kill(os.getpid(), signal.SIGKILL)
