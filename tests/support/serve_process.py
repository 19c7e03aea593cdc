"""Run Serve in a process of its own, since Ray reads its environment at import.

``python -m tests.support.serve_process CONFIG.json PORT MARK`` deploys, prints ``READY``, then answers commands, one a
line. Each answer begins with MARK: Ray prints to the same stream.
"""

import asyncio
import json
import sys
import time
from pathlib import Path

import ray
from ray import serve
from ray.serve.schema import ServeDeploySchema

START_TIMEOUT_S = 240


def start(config: dict[str, object], port: int) -> None:
    ray.init(
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=100_000_000,
        log_to_driver=False,
        _node_ip_address="127.0.0.1",
    )
    serve.start(http_options={"host": "127.0.0.1", "port": port}, proxy_location="HeadOnly")
    deploy(config)


def deploy(config: dict[str, object]) -> None:
    client = serve.context._get_global_client()
    client.deploy_apps(ServeDeploySchema.model_validate(config))
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        found = serve.status().applications
        if found and all(app.status == "RUNNING" for app in found.values()):
            return
        if any(app.status == "DEPLOY_FAILED" for app in found.values()):
            break
        time.sleep(0.2)
    raise SystemExit(f"not deployed: {serve.status()}")


async def answer(command: str) -> object:
    if command.startswith("deploy "):
        await asyncio.to_thread(lambda: deploy(json.loads(Path(command.removeprefix("deploy ")).read_text())))
        return "deployed"
    raise SystemExit(f"unknown command {command!r}")


async def serve_commands() -> None:
    while line := (await asyncio.to_thread(sys.stdin.readline)).strip():
        print(sys.argv[3] + json.dumps(await answer(line)), flush=True)


def main() -> None:
    start(json.loads(Path(sys.argv[1]).read_text()), int(sys.argv[2]))
    print("READY", flush=True)
    asyncio.run(serve_commands())
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
