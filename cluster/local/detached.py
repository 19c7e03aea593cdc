"""A supervisor that runs in the background, for ``farebox up --detach``; its log is ``supervisor.log``."""

import os
import subprocess
import sys
import time
from datetime import datetime

from billing.errors import BillingError
from cluster.errors import ClusterError
from cluster.local.launch import LaunchError, Progress
from cluster.local.settings import Settings
from cluster.local.state import Home, Phase
from cluster.local.supervisor import supervise

_POLL_S = 0.1


def start_detached(settings: Settings, progress: Progress, timeout_s: float) -> None:
    """Start a supervisor that outlives this process, and return when it is healthy.

    Raises:
        LaunchError: it failed; with its own error.
    """
    home = Home.open(settings)
    home.remove_run()
    env = os.environ | {name: str(port) for name, port in settings.public_ports.items()}
    env |= {"FAREBOX_HOME": str(home.path), "FAREBOX_CONFIG": str(settings.config)}
    env |= {"FAREBOX_HAPROXY": "1" if settings.haproxy else "0"}
    log = home.logs / "supervisor.log"
    with log.open("ab") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "cluster.local.detached", str(timeout_s)],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    last_step = ""
    while True:
        run = home.read_run()
        if run is not None and run.pid == process.pid:
            if run.phase is Phase.HEALTHY:
                return
            if run.phase is Phase.STARTING and run.step != last_step:
                progress(last_step := run.step)
        if process.poll() is not None:
            run = home.read_run()
            raise LaunchError(run.problem if run and run.problem else f"farebox did not start: see {log}")
        time.sleep(_POLL_S)


def main() -> None:
    """Run the farebox that the environment describes. Argument 1 is how many seconds it may take to be healthy."""
    try:
        supervise(Settings.from_env(), _log, lambda: _log("healthy"), float(sys.argv[1]))
    except (ClusterError, BillingError) as error:
        _log(str(error))
        raise SystemExit(1) from None


def _log(text: str) -> None:
    print(f"{datetime.now().astimezone().isoformat(timespec='seconds')} {text}", flush=True)


if __name__ == "__main__":
    main()
