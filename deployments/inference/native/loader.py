"""Load adapters on a thread of its own: from disk into host memory, and from there into slots.

A slot that is being written is in no step, so steps never wait for a load. The files read must have the digest that
was asked for.
"""

import logging
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from deployments.inference.adapters import LinearShape, read_adapter
from deployments.inference.native.lora import HostAdapter, LoraPool, pin_memory, stage
from deployments.inference.native.registry import Load
from deployments.inference.request import AdapterRef, AdapterRejected

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Loaded:
    """The result of a load; ``error`` is empty if it succeeded."""

    load: Load
    error: str
    seconds: float = 0.0
    is_from_disk: bool = False


class Loader:
    """Does loads one by one, and calls ``report`` with each result, from its thread."""

    def __init__(
        self,
        pool: LoraPool,
        linears: Mapping[str, LinearShape],
        max_rank: int,
        host_bytes: int,
        root: str,
        report: Callable[[Loaded], None],
    ) -> None:
        self._pool = pool
        self._linears = linears
        self._max_rank = max_rank
        self._host_bytes = host_bytes
        self.host = HostCache(host_bytes)
        self._root = Path(root) if root else None
        self._report = report
        self._queue: queue.SimpleQueue[Load | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="farebox-adapters", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the load in progress."""
        self._queue.put(None)
        self._thread.join()

    def submit(self, load: Load) -> None:
        self._queue.put(load)

    def _run(self) -> None:
        while (load := self._queue.get()) is not None:
            error, started = "", time.perf_counter()
            is_from_disk = self.host.get(load.ref.digest) is None
            try:
                self._load(load)
            except AdapterRejected as rejected:
                error = str(rejected)
            except Exception as failed:
                log.exception("loading adapter %s failed", load.ref.name)
                error = f"loading failed: {type(failed).__name__}: {failed}"
            self._report(Loaded(load, error, time.perf_counter() - started, is_from_disk))

    def _load(self, load: Load) -> None:
        """Swap the adapter into its slot, and check its effect there. Raises AdapterRejected."""
        adapter = self._fetch(load.ref)
        self._pool.write(load.slot, adapter)
        with self._pool.beside_steps():
            failed = self._pool.ineffective(load.slot, adapter)
        if failed:
            raise AdapterRejected(f"its weights took no effect in {failed}")

    def _fetch(self, ref: AdapterRef) -> HostAdapter:
        """The adapter from host memory, else from disk. Raises AdapterRejected."""
        adapter = self.host.get(ref.digest)
        if adapter is None:
            files = read_adapter(
                Path(ref.path),
                linears=self._linears,
                max_rank=self._max_rank,
                root=self._root,
                max_bytes=self._host_bytes,
            )
            if files.info.digest != ref.digest:
                raise AdapterRejected(f"its bytes have the digest {files.info.digest}, not {ref.digest}")
            adapter = stage(files, self._pool.dtype)
            if self._pool.is_on_gpu:
                adapter = pin_memory(adapter)
            self.host.put(ref, adapter)
        return adapter


class HostCache:
    """Adapters in host memory, up to ``max_bytes``; the least recently used is dropped first."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._adapters: OrderedDict[str, tuple[str, HostAdapter]] = OrderedDict()
        """Digest to name and weights."""
        self.nbytes = 0

    def get(self, digest: str) -> HostAdapter | None:
        found = self._adapters.get(digest)
        if found is None:
            return None
        self._adapters.move_to_end(digest)
        return found[1]

    @property
    def names(self) -> dict[str, str]:
        """Digest to name. Any thread may ask."""
        kept = list(self._adapters.items())
        return {digest: name for digest, (name, _) in kept}

    def put(self, ref: AdapterRef, adapter: HostAdapter) -> None:
        """Keep an adapter, unless it is larger than the whole cache."""
        if adapter.nbytes > self._max_bytes:
            return
        self._adapters[ref.digest] = (ref.name, adapter)
        self.nbytes += adapter.nbytes
        while self.nbytes > self._max_bytes:
            _, (_, dropped) = self._adapters.popitem(last=False)
            self.nbytes -= dropped.nbytes
