"""State folders as a running farebox writes them, for commands that look for one."""

import os
from dataclasses import replace

from cluster.local.environment import OperatorEnvironment
from cluster.local.settings import Settings
from cluster.local.state import Home, Phase, Run, start_time


def run_of(pid: int, **fields: object) -> Run:
    """The run of a process that lives; ``fields`` replace the defaults."""
    run = Run(
        pid=pid,
        started=start_time(pid) or 0.0,
        api_url="http://127.0.0.1:8000",
        dashboard_url="http://127.0.0.1:8265",
        sandbox_url="http://127.0.0.1:9",
        store_url="",
        config="serve_config.yaml",
        ports_base=10_240,
        haproxy=False,
    )
    return replace(run, **fields)  # type: ignore[arg-type]


def write_healthy_run(store_url: str, sandbox_url: str = "http://127.0.0.1:9") -> None:
    """Write into ``FAREBOX_HOME`` that this process is a healthy farebox with that store."""
    run = run_of(os.getpid(), store_url=store_url, sandbox_url=sandbox_url, phase=Phase.HEALTHY)
    home = Home.open(Settings.from_env())
    OperatorEnvironment.read().keep_in(home)
    home.write_run(run)
