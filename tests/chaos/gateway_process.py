"""A gateway in a process that kills itself: the parts of ``deployments.gateway.wiring`` and a real HTTP server.

The engine is scripted, and failpoints in the ledger and in the link end the process at a named point. Everything else
is what production runs.
"""

import asyncio
import os
import socket
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import uvicorn
from redis.asyncio import Redis

from billing.ledger.account import Hold, HoldRequest, Progress, Receipt, Settlement
from billing.ledger.ledger import Ledger
from billing.store.connection import connect
from billing.usage import RequestId
from deployments.config import FareboxArgs
from deployments.gateway import wiring
from deployments.gateway.api.application import make_app
from deployments.gateway.catalog_holder import CatalogHolder
from deployments.inference.request import GenerateRequest, OutputDelta
from deployments.inference.text import Text
from tests.chaos.failpoint import Failpoint
from tests.support.scripted import ScriptedLink

AFTER_HOLD, MID_STREAM, BEFORE_SETTLE, AFTER_SETTLE = "after hold", "mid-stream", "before settle", "after settle"
MID_STREAM_TOKENS = 6
HOLDS = "holds.txt"
"""A file with one line for each hold: when it was made, in milliseconds of the store's clock."""


@dataclass(frozen=True)
class GatewaySpec:
    """What a gateway process is started with."""

    store_url: str
    folder: Path
    environ: Mapping[str, str]
    user_config: Mapping[str, object]
    failpoint: Failpoint = field(default_factory=Failpoint)
    lease_s: float = 4.0
    checkpoint_s: float = 0.1
    hold_step_tokens: int = 4
    tokens: int = 16
    token_s: float = 0.02

    @property
    def journal(self) -> Path:
        return self.folder / "checkpoints.txt"


class FailpointLedger(Ledger):
    """A ledger with failpoints that logs each checkpoint before the call (``sent``) and after it (``kept``)."""

    def __init__(self, failpoint: Failpoint, journal: Path, redis: Redis, **wired: object) -> None:
        super().__init__(redis, **wired)  # type: ignore[arg-type]
        self._failpoint = failpoint
        self._journal = os.open(journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        self._holds = os.open(journal.with_name(HOLDS), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    async def hold(self, request: HoldRequest) -> Hold:
        hold = await super().hold(request)
        os.write(self._holds, f"{hold.lease_ends_at_ms - request.lease_ms}\n".encode())
        self._failpoint.reach(AFTER_HOLD)
        return hold

    async def settle(self, settlement: Settlement) -> Receipt:
        self._failpoint.reach(BEFORE_SETTLE)
        receipt = await super().settle(settlement)
        self._failpoint.reach(AFTER_SETTLE)
        return receipt

    async def checkpoint(self, progress: Sequence[Progress]) -> frozenset[RequestId]:
        self._note("sent", progress)
        gone = await super().checkpoint(progress)
        self._note("kept", [one for one in progress if one.request_id not in gone])
        return gone

    def _note(self, word: str, progress: Sequence[Progress]) -> None:
        """Write all lines at once: what the kernel has taken survives a SIGKILL."""
        lines = "".join(f"{word} {one.request_id} {one.list_nanos}\n" for one in progress)
        os.write(self._journal, lines.encode())


class FailpointLink(ScriptedLink):
    """A scripted engine with a failpoint in the middle of a stream."""

    def __init__(self, spec: GatewaySpec) -> None:
        super().__init__(length=spec.tokens, pause_s=spec.token_s)
        self._failpoint = spec.failpoint

    async def generate(self, job: GenerateRequest) -> AsyncGenerator[OutputDelta, None]:
        async with aclosing(super().generate(job)) as pieces:
            async for piece in pieces:
                yield piece
                if piece.completion_tokens == MID_STREAM_TOKENS:
                    self._failpoint.reach(MID_STREAM)


def serve(spec: GatewaySpec, listener: socket.socket) -> None:
    """Answer on ``listener`` until the failpoint kills the process."""
    asyncio.run(_serve(spec, listener))


async def _serve(spec: GatewaySpec, listener: socket.socket) -> None:
    wiring.Ledger = partial(FailpointLedger, spec.failpoint, spec.journal)  # type: ignore[misc, assignment]
    catalog_holder = CatalogHolder()
    catalog_holder.put(spec.user_config)
    args = FareboxArgs.model_validate(
        {
            "model": {"id": "farebox-base", "path": "unused"},
            "spool_dir": str(spec.folder / "spool"),
            "lease_s": spec.lease_s,
            "checkpoint_s": spec.checkpoint_s,
            "hold_step_tokens": spec.hold_step_tokens,
        }
    )
    redis, text, link = await connect(spec.store_url), Text(spec.folder / "model"), FailpointLink(spec)
    services = wiring.build_services(args, text, redis, link, catalog_holder, spec.environ, f"gw_{os.getpid()}")
    config = uvicorn.Config(make_app(services), lifespan="on", log_level="warning", access_log=False, ws="none")
    await uvicorn.Server(config).serve(sockets=[listener])
    await redis.aclose()
