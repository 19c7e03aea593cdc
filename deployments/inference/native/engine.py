"""The engine: one base model and its adapters behind a thread-safe face.

Knows tokens and adapters; knows no tenant, price, transport or cluster. Alone it is used like this::

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
from types import TracebackType

import torch

from deployments.inference.native.blocks import KvBlocks
from deployments.inference.native.inbox import Aborted, Extended, Inbox, Pinned
from deployments.inference.native.kv import KvTable
from deployments.inference.native.loader import Loader
from deployments.inference.native.model import Model
from deployments.inference.native.output import Answer, Output
from deployments.inference.native.sampler import seed_of
from deployments.inference.native.scheduler import Scheduler
from deployments.inference.native.sequence import Sequence
from deployments.inference.native.settings import EngineSettings
from deployments.inference.native.slots import AdapterSlots
from deployments.inference.native.worker import Counts, Worker
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


class Pieces:
    """A request's output as it comes: iterate over it once, or take all of its text."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[OutputDelta] = queue.SimpleQueue()

    def put(self, piece: OutputDelta) -> None:
        self._queue.put(piece)

    def __iter__(self) -> Iterator[OutputDelta]:
        is_over = False
        while not is_over:
            piece = self._queue.get()
            is_over = piece.finish_reason is not None
            yield piece

    def text(self) -> str:
        """The first answer's text, when it is complete.

        Raises:
            EngineFailed: it will not be complete: the request failed, was aborted or ran out of time.
        """
        text = ""
        for piece in self:
            if piece.finish_reason in (FinishReason.ERROR, FinishReason.ABORT):
                raise EngineFailed(piece.error or "the request was aborted")
            text += "".join(choice.text for choice in piece.as_choices if choice.index == 0)
        return text


class Engine:
    """Serves many requests at once, each with its own adapter.

    Construction loads the model and proves it, which takes as long as it takes.

    Raises:
        ModelRejected: the model or the settings cannot be served.
    """

    def __init__(self, config: EngineSettings, is_tiled: bool | None = None) -> None:
        """``is_tiled``: as for ``Model``."""
        torch.set_num_threads(config.torch_threads)
        self.config = config
        self.text = Text(config.model_path)
        self._inbox = Inbox(config.max_running + config.max_queued)
        self._model = Model(config, is_tiled)
        self._kv = _kv(config, self._model)
        self._slots = AdapterSlots(config.adapter_slots)
        self._counts = Counts()
        self._loader = Loader(
            pool=self._model.lora,
            linears=self._model.linears,
            max_rank=config.max_adapter_rank,
            host_bytes=config.adapter_host_mb << 20,
            root=config.adapter_root,
            report=self._inbox.post,
        )
        self._scheduler = Scheduler(
            self._kv, self._slots, config.max_batched_tokens, config.adapter_wait_s, config.preempt_after_s
        )
        worker = Worker(
            inbox=self._inbox,
            model=self._model,
            scheduler=self._scheduler,
            slots=self._slots,
            loader=self._loader,
            outputs={},
            counts=self._counts,
        )
        self._thread = threading.Thread(
            target=worker.run, args=(config.torch_threads,), name="farebox-engine", daemon=True
        )

    def start(self) -> None:
        """Begin to work."""
        self._loader.start()
        self._thread.start()

    def stop(self) -> None:
        """Abort what is left, answer it, and end both threads."""
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

    def submit(self, request: GenerateRequest, emit: Emit | None = None) -> Pieces:
        """Take a request. Its pieces go to ``emit`` if there is one, else into what is returned.

        ``emit`` is called from the engine's thread and must return at once. The last piece, and no other,
        has a finish reason.

        Raises:
            RequestRejected: it cannot run here.
            AdapterRejected: its adapter was found to be bad a short while ago.
            Overloaded: the queue is full.
            EngineFailed: the engine has died or is stopping.
        """
        now = time.monotonic()
        self._validate(request, now)
        pieces = Pieces()
        self._inbox.submit(
            Output(
                request=request,
                answers=self._answers(request),
                emit=emit or pieces.put,
                deadline=now + request.time_to_live_s,
            )
        )
        return pieces

    def abort(self, request_id: str) -> None:
        """End a request within one step; its last piece says ``abort``. No effect if it has ended."""
        self._inbox.post(Aborted(request_id))

    def extend(self, deadlines: Mapping[str, float]) -> None:
        """Move deadlines: request id to seconds from now. Unknown ids are passed over."""
        now = time.monotonic()
        self._inbox.post(Extended({request_id: now + seconds for request_id, seconds in deadlines.items()}))

    def pin(self, refs: Iterable[AdapterRef]) -> None:
        """Keep these in their slots, instead of those pinned before, and load what finds a slot now.

        The first of them come first; one slot always stays for others.
        """
        self._inbox.post(Pinned(tuple(refs)))

    def check(self) -> None:
        """Raise ``EngineFailed`` if the engine's thread has died."""
        if self._inbox.failure:
            raise EngineFailed(self._inbox.failure)

    def stats(self) -> EngineStats:
        """Counters and gauges at this moment."""
        counts = self._counts
        requests, queued_tokens = self._inbox.load()
        active = {sequence.request_id: sequence.digest for sequence in self._scheduler.running}
        running = min(len(active), requests)
        return EngineStats(
            steps=counts.steps,
            mixed_steps=counts.mixed_steps,
            max_adapters_in_step=counts.max_adapters_in_step,
            prompt_tokens=counts.prompt_tokens,
            generation_tokens=counts.generation_tokens,
            cached_tokens=counts.cached_tokens,
            running=running,
            waiting=requests - running,
            queued_tokens=queued_tokens,
            kv_blocks_used=self._kv.used,
            kv_blocks_total=self._kv.count,
            requests_finished=counts.requests_finished,
            requests_aborted=counts.requests_aborted,
            adapter_loads=counts.adapter_loads,
            adapter_load_ms=round(counts.adapter_load_s * 1000),
            adapter_disk_loads=counts.adapter_disk_loads,
            adapter_hits=counts.adapter_hits,
            adapter_requests=counts.adapter_requests,
            adapter_host_bytes=self._loader.host.nbytes,
            preemptions=self._scheduler.preemptions,
            adapters_resident=tuple(f"{r.ref.name}@{r.ref.digest}" for r in self._slots.residents),
            adapters=self._adapters(Counter(active.values())),
        )

    def _adapters(self, running: Mapping[str, int]) -> tuple[AdapterStats, ...]:
        """Those with requests, in slots and in host memory, by digest."""
        requests = {ref.digest: (ref.name, count) for ref, count in self._inbox.adapters().items()}
        names = self._loader.host.names | {r.ref.digest: r.ref.name for r in self._slots.residents}
        tiers = dict.fromkeys(self._loader.host.names, "host")
        tiers |= {r.ref.digest: "slot" if r.ready else "loading" for r in self._slots.everyone}
        found = []
        for digest in sorted(requests.keys() | tiers.keys()):
            name, count = requests.get(digest, (names.get(digest, ""), 0))
            active = min(running.get(digest, 0), count)
            tier, pinned = tiers.get(digest, ""), self._slots.is_pinned(digest)
            found.append(AdapterStats(name, digest, tier, active, count - active, pinned))
        return tuple(found)

    async def generate(self, request: GenerateRequest) -> AsyncIterator[OutputDelta]:
        """The request's pieces as they come; closing the iterator aborts. Raises as ``submit``."""
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[OutputDelta] = asyncio.Queue()

        def emit(piece: OutputDelta) -> None:
            loop.call_soon_threadsafe(pieces.put_nowait, piece)

        self.submit(request, emit)
        finished = False
        try:
            while not finished:
                piece = await pieces.get()
                finished = piece.finish_reason is not None
                yield piece
        finally:
            if not finished:
                self.abort(request.request_id)

    def _answers(self, request: GenerateRequest) -> tuple[Answer, ...]:
        given = request.sampling.seed
        seed = secrets.randbits(64) if given is None else given
        return tuple(
            Answer(
                sequence=Sequence(request=request, seed=seed_of(seed, index), index=index),
                detokenizer=self.text.detokenizer(request.sampling.stop),
                end_token_ids=self.text.eos_token_ids,
                max_context_tokens=self.config.max_context_tokens,
            )
            for index in range(request.sampling.n)
        )

    def _validate(self, request: GenerateRequest, now: float) -> None:
        prompt = request.prompt_token_ids
        if not prompt:
            raise RequestRejected("the prompt is empty")
        if len(prompt) >= self.config.max_context_tokens:
            raise RequestRejected(
                f"the prompt has {len(prompt)} tokens; the context is {self.config.max_context_tokens}, answer included"
            )
        if not 0 <= min(prompt) <= max(prompt) < self._model.limits.vocabulary:
            raise RequestRejected("the prompt has a token that the model doesn't know")
        if any(token >= self._model.limits.vocabulary for token, _ in request.sampling.logit_bias):
            raise RequestRejected("logit_bias names a token that the model doesn't know")
        if not 0 < request.fairness_weight < math.inf:
            raise RequestRejected(f"fairness_weight must be above 0, not {request.fairness_weight:g}")
        if request.adapter and (reason := self._slots.failure(request.adapter.digest, now)):
            raise AdapterRejected(f"adapter {request.adapter.name}: {reason}")


def _kv(config: EngineSettings, model: Model) -> KvBlocks | KvTable:
    """Who decides over the model's KV memory."""
    if model.is_tiled:
        return KvBlocks(model.sizes, config.max_running, config.prefix_cache, config.shared_prefixes)
    return KvTable(config.max_running, model.kv, config.prefix_cache, config.shared_prefixes)
