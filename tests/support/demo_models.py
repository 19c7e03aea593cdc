"""The demo models for the tests that serve or examine them."""

import fcntl
from pathlib import Path

from cluster.demo.models import make_models

OUT = Path(__file__).parent.parent.parent / ".farebox" / "models"


def demo_models() -> Path:
    """Make the demo models once per checkout, about a minute of CPU. A second process waits for the first."""
    OUT.parent.mkdir(exist_ok=True)
    with (OUT.parent / "models.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        make_models(OUT)
    return OUT
