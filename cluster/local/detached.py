"""The supervisor as a process of its own, for ``farebox up --detach``; its log is ``supervisor.log``."""

import sys
from datetime import datetime

from cluster.local import commerce
from cluster.local.settings import Settings
from cluster.local.state import AlreadyRunning
from cluster.local.supervisor import supervise


def main() -> None:
    """Run one farebox as the environment describes it; argument 1 is the seconds it has to become healthy."""
    settings = Settings.from_env()
    try:
        supervise(settings, _log, lambda _: _log("healthy"), float(sys.argv[1]))
    except (*commerce.FAILURES, AlreadyRunning) as error:
        _log(str(error))
        raise SystemExit(1) from None


def _log(text: str) -> None:
    print(f"{datetime.now().astimezone().isoformat(timespec='seconds')} {text}", flush=True)


if __name__ == "__main__":
    main()
