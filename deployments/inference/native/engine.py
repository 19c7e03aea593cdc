"""The engine: serves requests for one base model and its adapters, batched. ``Engine`` may be used from any thread.

It is used alone like this::

    with Engine(EngineSettings(".farebox/models/base")) as engine:
        prompt = engine.text.chat([{"role": "user", "content": "What is the capital of Japan?"}])
        pirate = local_adapter(".farebox/models/adapters/pirate")
        request = GenerateRequest("1", prompt, SamplingParams(max_tokens=40, temperature=0.0), adapter=pirate)
        print(engine.submit(request).text())
"""

import asyncio
import math
import queue
import secrets
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from dataclasses import asdict
from types import TracebackType

import torch

from deployments.inference.native.blocks import KvBlockAllocator
from deployments.inference.native.inbox import Abort, Extend, Inbox, Pin
from deployments.inference.native.kv import KvSlotAllocator
from deployments.inference.native.loader import Loader
from deployments.inference.native.model import Model
from deployments.inference.native.output import RequestOutput, SequenceOutput
from deployments.inference.native.registry import AdapterRegistry
from deployments.inference.native.sampler import choice_seed
from deployments.inference.native.scheduler import Scheduler
from deployments.inference.native.sequence import Sequence
from deployments.inference.native.settings import EngineSettings
from deployments.inference.native.worker import Counters, Worker
from deployments.inference.request import (
    AdapterRef,
    AdapterRejected,
    AdapterStats,
    Emit,
    EngineFailed,
    EngineStats,
    FinishReason,
    GenerateRequest,
    OutputDelta,
    RequestRejected,
)
from deployments.inference.text import Text


class Engine:
    """Serves many requests at once, each on its own adapter or the base model.

    The constructor loads the model and compares its logits with those of the plain model. ``start`` starts the engine's
    threads and ``stop`` ends them; a ``with`` block does both.

    Raises:
        ModelRejected: the model or the settings cannot be served.
    """

    def __init__(self, settings: EngineSettings, is_tiled: bool | None = None) -> None:
        """``is_tiled``: as for ``Model``."""
        torch.set_num_threads(settings.torch_threads)
        self.settings = settings
        self.text = Text(settings.model_path)
        self._inbox = Inbox(settings.max_running + settings.max_queued)
        self._model = Model(settings, is_tiled)
        self._kv = _kv_allocator(settings, self._model)
        self._adapters = AdapterRegistry(settings.adapter_slots)
        self._counters = Counters()
        self._loader = Loader(
            pool=self._model.lora,
            linears=self._model.linears,
            max_rank=settings.max_adapter_rank,
            host_bytes=settings.adapter_host_mb << 20,
            root=settings.adapter_root,
            report=self._inbox.post,
        )
        self._scheduler = Scheduler(
            self._kv, self._adapters, settings.max_batched_tokens, settings.adapter_wait_s, settings.preempt_after_s
        )
        worker = Worker(
            inbox=self._inbox,
            model=self._model,
            scheduler=self._scheduler,
            adapters=self._adapters,
            loader=self._loader,
            counters=self._counters,
        )
        self._thread = threading.Thread(
            target=worker.run, args=(settings.torch_threads,), name="farebox-engine", daemon=True
        )

    def start(self) -> None:
        """Start the engine's threads."""
        self._loader.start()
        self._thread.start()

    def stop(self) -> None:
        """Abort all requests, each with its last delta, and end the engine's threads."""
        self._inbox.stop()
        if self._thread.ident is not None:
            self._thread.join()
            self._loader.stop()

    def __enter__(self) -> "Engine":
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def submit(self, request: GenerateRequest, emit: Emit | None = None) -> "OutputStream":
        """Queue a request. Its deltas go to ``emit`` if that is given, else into the stream that is returned.

        ``emit`` is called from the engine's thread and must return at once; if it raises RuntimeError, the request is
        aborted. The last delta, and no other, has a finish reason.

        Raises:
            RequestRejected: the request cannot run on this engine.
            AdapterRejected: its adapter failed to load a short while ago.
            Overloaded: the queue is full.
            EngineFailed: the engine has failed or is stopping.
        """
        now = time.monotonic()
        self._validate(request, now)
        stream = OutputStream()
        self._inbox.submit(
            RequestOutput(
                request=request,
                outputs=self._sequence_outputs(request),
                emit=emit or stream.put,
                deadline=now + request.time_to_live_s,
            )
        )
        return stream

    async def generate(self, request: GenerateRequest) -> AsyncIterator[OutputDelta]:
        """Submit a request and yield its deltas. Closing the iterator aborts it. Raises as ``submit``."""
        loop = asyncio.get_running_loop()
        deltas: asyncio.Queue[OutputDelta] = asyncio.Queue()

        def emit(delta: OutputDelta) -> None:
            loop.call_soon_threadsafe(deltas.put_nowait, delta)

        self.submit(request, emit)
        is_finished = False
        try:
            while not is_finished:
                delta = await deltas.get()
                is_finished = delta.finish_reason is not None
                yield delta
        finally:
            if not is_finished:
                self.abort(request.request_id)

    def abort(self, request_id: str) -> None:
        """End a request within one step; its last delta has the finish reason ``abort``. Unknown ids are ignored."""
        self._inbox.post(Abort(request_id))

    def extend(self, deadlines: Mapping[str, float]) -> None:
        """Set deadlines: request id to seconds from now. Unknown ids are ignored."""
        now = time.monotonic()
        self._inbox.post(Extend({request_id: now + seconds for request_id, seconds in deadlines.items()}))

    def pin(self, refs: Iterable[AdapterRef]) -> None:
        """Never evict these adapters, instead of those pinned before, and load them as far as slots can be had.

        The first come first. One slot always stays for other adapters.
        """
        self._inbox.post(Pin(tuple(refs)))

    def check(self) -> None:
        """Raise ``EngineFailed`` if the engine has failed."""
        if self._inbox.failure:
            raise EngineFailed(self._inbox.failure)

    def stats(self) -> EngineStats:
        """The counters and gauges at this moment."""
        requests, queued_tokens = self._inbox.unfinished()
        active = {sequence.request_id: sequence.digest for sequence in self._scheduler.running}
        running = min(len(active), requests)
        counters = asdict(self._counters) | {"adapter_load_ms": round(self._counters.adapter_load_ms)}
        return EngineStats(
            **counters,
            running=running,
            waiting=requests - running,
            queued_tokens=queued_tokens,
            kv_blocks_used=self._kv.used,
            kv_blocks_total=self._kv.count,
            adapter_host_bytes=self._loader.host.nbytes,
            preemptions=self._scheduler.preemptions,
            adapters_resident=tuple(f"{one.ref.name}@{one.ref.digest}" for one in self._adapters.loaded),
            adapters=self._adapter_stats(Counter(active.values())),
        )

    def _adapter_stats(self, running: Mapping[str, int]) -> tuple[AdapterStats, ...]:
        """Every adapter that has requests, a slot or host memory, by digest. ``running``: requests by digest."""
        requests = {ref.digest: (ref.name, count) for ref, count in self._inbox.adapters().items()}
        names = self._loader.host.names | {one.ref.digest: one.ref.name for one in self._adapters.loaded}
        tiers = dict.fromkeys(self._loader.host.names, "host")
        tiers |= {one.ref.digest: "slot" if one.is_loaded else "loading" for one in self._adapters.residents}
        found = []
        for digest in sorted(requests.keys() | tiers.keys()):
            name, count = requests.get(digest, (names.get(digest, ""), 0))
            active = min(running.get(digest, 0), count)
            tier, pinned = tiers.get(digest, ""), self._adapters.is_pinned(digest)
            found.append(AdapterStats(name, digest, tier, active, count - active, pinned))
        return tuple(found)

    def _sequence_outputs(self, request: GenerateRequest) -> tuple[SequenceOutput, ...]:
        given = request.sampling.seed
        seed = secrets.randbits(64) if given is None else given
        return tuple(
            SequenceOutput(
                sequence=Sequence(request=request, seed=choice_seed(seed, index), index=index),
                detokenizer=self.text.detokenizer(request.sampling.stop),
                end_token_ids=self.text.eos_token_ids,
                max_context_tokens=self.settings.max_context_tokens,
            )
            for index in range(request.sampling.n)
        )

    def _validate(self, request: GenerateRequest, now: float) -> None:
        prompt, context, vocab_size = request.prompt_token_ids, self.settings.max_context_tokens, self._model.vocab_size
        if not prompt:
            raise RequestRejected("the prompt is empty")
        if len(prompt) >= context:
            raise RequestRejected(
                f"the prompt has {len(prompt)} tokens; prompt and completion together may have {context}"
            )
        biased = [token for token, _ in request.sampling.logit_bias]
        for what, tokens in (("the prompt", prompt), ("logit_bias", biased)):
            extremes = min(tokens, default=0), max(tokens, default=0)
            if outside := [token for token in extremes if not 0 <= token < vocab_size]:
                raise RequestRejected(f"{what} has token {outside[0]}; the model's tokens are 0 to {vocab_size - 1}")
        if not 0 < request.fairness_weight < math.inf:
            raise RequestRejected(f"fairness_weight must be above 0 and finite, not {request.fairness_weight:g}")
        if request.adapter and (reason := self._adapters.failure(request.adapter.digest, now)):
            raise AdapterRejected(f"adapter {request.adapter.name}: {reason}")


class OutputStream:
    """A request's output deltas, each as soon as it is there: iterate over it once, or take the whole text."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[OutputDelta] = queue.SimpleQueue()

    def put(self, delta: OutputDelta) -> None:
        self._queue.put(delta)

    def __iter__(self) -> Iterator[OutputDelta]:
        is_finished = False
        while not is_finished:
            delta = self._queue.get()
            is_finished = delta.finish_reason is not None
            yield delta

    def text(self) -> str:
        """Wait for the end, and return the text of the first choice.

        Raises:
            EngineFailed: the request failed, was aborted or ran out of time.
        """
        text = ""
        for delta in self:
            if delta.finish_reason in (FinishReason.ERROR, FinishReason.ABORT):
                raise EngineFailed(delta.error or "the request was aborted")
            text += "".join(choice.text for choice in delta.as_choices if choice.index == 0)
        return text


def _kv_allocator(settings: EngineSettings, model: Model) -> KvBlockAllocator | KvSlotAllocator:
    if model.is_tiled:
        return KvBlockAllocator(model.sizes, settings.max_running, settings.prefix_cache, settings.shared_prefixes)
    return KvSlotAllocator(settings.max_running, model.kv, settings.prefix_cache, settings.shared_prefixes)
