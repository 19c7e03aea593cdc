"""One Serve cluster with both applications of ``noop``, in Serve's default mode or behind HAProxy."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from cluster import valkey
from tests.bench import figures
from tests.support.serve_cluster import (
    ANSWER,
    REPO,
    Cluster,
    await_start,
    cmdline_of,
    environment,
    stop,
)
from tests.support.waiting import eventually, free_port

ARMS = {"billed": "/", "unbilled": "/unbilled"}
PRICE = {"input_per_1m": "1.00", "output_per_1m": "2.00"}
TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}<|assistant|>"


@dataclass
class BothArms:
    """Both applications, side by side in one cluster."""

    cluster: Cluster
    store: valkey.Valkey

    def url(self, arm: str) -> str:
        return f"{self.cluster.base_url}{ARMS[arm].rstrip('/')}/v1/chat/completions"

    def cpu_s(self, arm: str) -> float:
        """CPU time of one arm: its gateway, its replica, the proxy of both arms, and the store."""
        family = psutil.Process(self.cluster.process.pid).children(recursive=True)
        names = (f"ServeReplica:{arm}:", "ProxyActor", "haproxy", "HAProxyManager")
        serving = [child.pid for child in family if any(name in " ".join(cmdline_of(child)) for name in names)]
        return figures.cpu_s(self.store.pid, *serving)


@contextmanager
def both_arms(folder: Path, haproxy: bool) -> Iterator[BothArms]:
    """Start the cluster, and give one tenant credit; end it when left."""
    folder.mkdir()
    model = make_model(folder / "model")
    config: dict[str, object] = {
        "logging_config": {"enable_access_log": False},
        "applications": [_application(a, model) for a in ARMS],
    }
    (folder / "config.json").write_text(json.dumps(config))
    store, port = valkey.start(folder / "v"), free_port()
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.serve_process", str(folder / "config.json"), str(port), ANSWER],
            env=environment(store.url, folder, haproxy),
            cwd=REPO,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,
        )
        made = BothArms(Cluster(process, f"http://127.0.0.1:{port}", config, folder), store)
        try:
            await_start(made.cluster)
            ready = f"{made.cluster.base_url}{ARMS['unbilled']}/readyz"
            eventually(lambda: httpx.get(ready, timeout=5).status_code == 200, 60)
            yield made
        finally:
            stop(process)
            store.stop()


def _application(arm: str, model: Path) -> dict[str, object]:
    deployments: list[dict[str, object]] = [
        {
            "name": name,
            "num_replicas": 1,
            "max_ongoing_requests": 1000,
            "graceful_shutdown_timeout_s": 1,
            "ray_actor_options": {"num_cpus": 0.1},
        }
        for name in ("Gateway", "LoraReplica")
    ]
    deployments[0]["user_config"] = {
        "base": {"id": "farebox-base", "price": PRICE},
        "adapters": [{"id": "pirate", "path": str(model), "digest": "ab" * 32, "price": PRICE}],
        "plans": {"prepaid": {"kind": "prepaid"}},
        "default_plan": "prepaid",
    }
    return {
        "name": arm,
        "route_prefix": ARMS[arm],
        "import_path": f"tests.bench.noop:{arm}",
        "args": {
            "model": {"id": "farebox-base", "path": str(model)},
            "engine": {"max_context_tokens": 4096, "max_batched_tokens": 512},
            "spool_dir": str(model.parent / f"spool-{arm}"),
        },
        "deployments": deployments,
    }


def make_model(folder: Path) -> Path:
    """A model folder without weights: a gateway reads no more."""
    folder.mkdir()
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        ["the quick brown fox jumps over the lazy dog " * 20],
        trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, special_tokens=["<|end|>"], show_progress=False),
    )
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE, "eos_token": "<|end|>"}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": 0}))
    return folder
