"""The product's two deployments around an engine that computes nothing, with billing and without.

Everything else is the product's: ingress, link, transport, replica. ``unbilled`` replaces the ledger alone.
"""

import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from unittest.mock import patch

from ray.serve import Application

from billing.ledger.account import Hold, HoldRequest, Progress, Receipt, Settlement
from billing.ledger.ledger import Ledger
from billing.money import Nanos
from billing.usage import RequestId, UsageRecord
from deployments import app
from deployments.config import FareboxArgs
from deployments.gateway import wiring
from deployments.gateway.ingress import GatewayIngress
from deployments.inference.native.engine import Engine
from deployments.inference.native.settings import EngineSettings
from deployments.inference.request import AdapterRef, Emit, EngineStats, FinishReason, GenerateRequest, OutputDelta
from deployments.replica import replica
from deployments.replica.replica import LoraReplica

STEP_S = 0.005
"""Between two tokens of a stream: what a small model on a GPU takes for a step."""


class NoopEngine:
    """The engine's face. An answer of one token comes at once, a longer one a token at each step."""

    def __init__(self, config: EngineSettings) -> None:
        self.config = config
        self._running: dict[str, tuple[GenerateRequest, Emit, int]] = {}
        self._changed = threading.Condition()
        self._is_stopped = False
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        with self._changed:
            self._is_stopped = True
            self._changed.notify()

    def submit(self, request: GenerateRequest, emit: Emit) -> None:
        if request.sampling.max_tokens == 1:
            emit(_piece(request, 1))
            return
        with self._changed:
            self._running[request.request_id] = (request, emit, 0)
            self._changed.notify()

    def abort(self, request_id: str) -> None:
        with self._changed:
            self._running.pop(request_id, None)

    def extend(self, deadlines: Mapping[str, float]) -> None:
        """No deadline is kept: every request here ends by itself."""

    def pin(self, refs: Iterable[AdapterRef]) -> None:
        """There are no slots."""

    def check(self) -> None:
        assert self._thread.is_alive(), "the engine's thread lives as long as its replica"

    generate = Engine.generate
    """Made of the methods above."""

    def stats(self) -> EngineStats:
        return EngineStats(running=len(self._running))

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._running and not self._is_stopped:
                    self._changed.wait()
                if self._is_stopped:
                    return
                ready = [self._step(*one) for one in list(self._running.values())]
            for emit, piece in ready:
                emit(piece)
            time.sleep(STEP_S)

    def _step(self, request: GenerateRequest, emit: Emit, done: int) -> tuple[Emit, OutputDelta]:
        if done + 1 < request.sampling.max_tokens:
            self._running[request.request_id] = (request, emit, done + 1)
        else:
            del self._running[request.request_id]
        return emit, _piece(request, done + 1)


def _piece(request: GenerateRequest, count: int) -> OutputDelta:
    return OutputDelta(
        token_ids=(count,),
        text=f"tok{count} ",
        prompt_tokens=len(request.prompt_token_ids),
        cached_tokens=0,
        completion_tokens=count,
        compute_ms=count,
        finish_reason=FinishReason.LENGTH if count == request.sampling.max_tokens else None,
    )


class NoLedger(Ledger):
    """Admits everything and records nothing; the reply carries the same receipt."""

    _held: dict[RequestId, HoldRequest]

    async def hold(self, request: HoldRequest, *_: object, **__: object) -> Hold:
        self.__dict__.setdefault("_held", {})[request.request_id] = request
        return Hold(request, request.max_tokens, (), 0, Nanos(0), covered_by_requests=True)

    async def settle(self, settlement: Settlement) -> Receipt:
        request = self._held.pop(settlement.request_id)
        record = UsageRecord(
            record_id=f"rec_{request.request_id}",
            request_id=request.request_id,
            tenant=request.tenant,
            key_id=request.key_id,
            adapter=request.adapter,
            adapter_class=request.adapter_class,
            plan=request.plan,
            price_version=request.price.version,
            usage=settlement.usage,
            status=settlement.status,
            occurred_at_ms=0,
            list_nanos=settlement.list_nanos,
            charged_nanos=Nanos(0),
        )
        return Receipt(record)

    async def checkpoint(self, progress: Sequence[Progress]) -> frozenset[RequestId]:
        return frozenset()

    async def expire(self, limit: int = 100) -> int:
        return 0


class NoopReplica(LoraReplica):
    async def __init__(self, args: FareboxArgs) -> None:  # type: ignore[misc]
        vars(replica)["Engine"] = NoopEngine
        await super().__init__(args)


class UnbilledIngress(GatewayIngress):
    async def __init__(self, *args: object, **kwargs: object) -> None:  # type: ignore[misc]
        vars(wiring)["Ledger"] = NoLedger
        await super().__init__(*args, **kwargs)  # type: ignore[arg-type]


def billed(args: FareboxArgs) -> Application:
    with patch.object(app, "LoraReplica", NoopReplica):
        return app.build(args)


def unbilled(args: FareboxArgs) -> Application:
    with patch.object(app, "LoraReplica", NoopReplica), patch.object(app, "GatewayIngress", UnbilledIngress):
        return app.build(args)
