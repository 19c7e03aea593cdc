"""A folder that tells of a running farebox whose store is real, for the commands that ask its books."""

import os

from cluster.local.settings import Settings
from cluster.local.state import Home, Phase, Run, birth


def tell(store_url: str, sandbox_url: str = "http://127.0.0.1:9") -> None:
    """Write into ``FAREBOX_HOME`` that this process is a healthy farebox."""
    pid = os.getpid()
    Home.open(Settings.from_env()).tell(
        Run(
            pid=pid,
            started=birth(pid) or 0.0,
            api_url="http://127.0.0.1:8000",
            dashboard_url="http://127.0.0.1:8265",
            sandbox_url=sandbox_url,
            store_url=store_url,
            config="serve_config.yaml",
            ports_base=10_240,
            haproxy=False,
            phase=Phase.HEALTHY,
        )
    )
