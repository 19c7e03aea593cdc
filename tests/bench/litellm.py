"""The LiteLLM proxy as a peer: in a virtual environment of its own, with mock responses, one key, and computed costs.

Its virtual keys and its table of spend need a database through Prisma's query engine, a binary that no package
registry carries; so the one key is the master key, and nothing is written anywhere: less work than it would do.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from tests.bench import figures
from tests.support.waiting import eventually, free_port

VERSION = "1.108.7"
ENVIRONMENT = figures.ROOT / ".bench" / "litellm"
KEY = "sk-bench"
ANSWER = "Arr! The capital o' Japan be Tokyo, matey!"
CONFIG = {
    "model_list": [
        {
            "model_name": "pirate",
            "litellm_params": {
                "model": "openai/pirate",
                "api_key": "none",
                "mock_response": ANSWER,
                "input_cost_per_token": 0.000001,
                "output_cost_per_token": 0.000002,
            },
        }
    ],
    "general_settings": {"master_key": KEY},
    "litellm_settings": {"telemetry": False, "set_verbose": False},
}


@dataclass
class Proxy:
    """A running proxy with one worker process."""

    url: str
    process: subprocess.Popen[bytes]

    def cpu_s(self) -> float:
        family = psutil.Process(self.process.pid).children(recursive=True)
        return figures.cpu_s(self.process.pid, *(child.pid for child in family))


def install() -> None:
    """Install the proxy, once: the first run takes a minute or two longer."""
    if (ENVIRONMENT / "bin" / "litellm").exists():
        return
    subprocess.run([sys.executable, "-m", "venv", str(ENVIRONMENT)], check=True)
    pip = [str(ENVIRONMENT / "bin" / "pip"), "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, f"litellm[proxy]=={VERSION}"], check=True)


@contextmanager
def proxy(folder: Path) -> Iterator[Proxy]:
    """Start the proxy, and wait until it answers with its cost; end it when left."""
    install()
    folder.mkdir()
    (folder / "config.yaml").write_text(json.dumps(CONFIG))
    port = free_port()
    command = [str(ENVIRONMENT / "bin" / "litellm"), "--config", str(folder / "config.yaml")]
    command += ["--host", "127.0.0.1", "--port", str(port), "--num_workers", "1"]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "RAY_", "DATABASE"))}
    settings = {"LITELLM_LOG": "ERROR", "LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_MODE": "PRODUCTION"}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, env=kept | settings, cwd=folder, stdout=log, stderr=log)
        made = Proxy(f"http://127.0.0.1:{port}/v1/chat/completions", process)
        try:
            eventually(lambda: _answers(made), 90)
            yield made
        finally:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()
            process.wait()


def _answers(made: Proxy) -> bool | None:
    assert made.process.poll() is None, "the proxy ended"
    body = {"model": "pirate", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
    with suppress(httpx.HTTPError):
        reply = httpx.post(made.url, json=body, headers={"Authorization": f"Bearer {KEY}"}, timeout=10)
        if reply.status_code == 200:
            assert float(reply.headers["x-litellm-response-cost"]) > 0, "spend is computed"
            return True
    time.sleep(0.5)
    return None
