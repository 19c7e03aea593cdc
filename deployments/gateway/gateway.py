"""A request's course: authenticate, hold, run, settle.

Knows the order of these steps and how each can end; knows no HTTP and no Redis key.
"""

import asyncio
import logging
from dataclasses import dataclass, replace

from billing.abuse.addresses import AddressSketches
from billing.catalog.catalog import Model
from billing.ledger.account import Hold
from billing.ledger.admission import Admission, Quote
from billing.ledger.leases import Leases
from billing.ledger.ledger import Ledger
from billing.ledger.replay import Replay
from billing.ledger.spool import Spool
from billing.tenants.directory import Tenants
from billing.tenants.errors import InvalidKey
from billing.tenants.tenant import Principal
from billing.usage import RequestId
from deployments.gateway.catalog_holder import CatalogHolder
from deployments.gateway.load import LoadMeter
from deployments.gateway.metrics import GatewayMetrics
from deployments.gateway.request_state import Run, Surroundings
from deployments.gateway.settlement import Settler
from deployments.inference.request import AdapterRef, GenerateRequest, RequestRejected, SamplingParams
from deployments.inference.text import Text
from deployments.token_stream.link import ReplicaLink

LONG_PROMPT_CHARS = 2_000
"""Longer prompts are encoded off the event loop, so that they delay nobody's tokens."""
STOP_TIMEOUT_S = 20.0

logger = logging.getLogger(__name__)
Prompt = list[dict[str, str]] | str | tuple[int, ...]
"""A chat, a text, or token ids."""


class ContextTooLong(RequestRejected):
    """The prompt leaves no room for an answer in the model's context."""


@dataclass(frozen=True, slots=True)
class Ask:
    """What a client wants, parsed. ``sampling.max_tokens`` is decided by the hold."""

    model: str
    prompt: Prompt
    sampling: SamplingParams
    max_tokens: int | None = None
    """``None``: as many as the context has room for."""


@dataclass(frozen=True, slots=True)
class Priced:
    """An ask whose model and prompt are known: ready to be held or quoted."""

    model: Model
    prompt_token_ids: tuple[int, ...]
    max_tokens: int
    """Of all its answers together."""


class Gateway:
    """Everything a request passes between the wire and the engine, and the tasks that outlive connections."""

    def __init__(
        self,
        *,
        catalog_holder: CatalogHolder,
        text: Text,
        tenants: Tenants,
        ledger: Ledger,
        admission: Admission,
        spool: Spool,
        replay: Replay,
        link: ReplicaLink,
        load: LoadMeter,
        address_sketches: AddressSketches,
        metrics: GatewayMetrics,
        max_context_tokens: int,
        lease_s: float,
        checkpoint_s: float,
        answer_timeout_s: float,
    ) -> None:
        self.catalog_holder, self.text, self.link, self.metrics, self._load = catalog_holder, text, link, metrics, load
        self._tenants, self._ledger, self._admission = tenants, ledger, admission
        self.address_sketches = address_sketches
        self._max_context_tokens, self._lease_s, self._checkpoint_s = max_context_tokens, lease_s, checkpoint_s
        self._answer_timeout_s = answer_timeout_s
        self.leases = Leases(ledger, self.lose, checkpoint_s)
        self.settler = Settler(ledger, spool, metrics)
        self._redo = replay
        self._surroundings = Surroundings(link, ledger, self.leases, self.settler, metrics, self._untrack)
        self._runs: dict[RequestId, Run] = {}
        self._loops: list[asyncio.Task[None]] = []
        self._is_stopped = False

    async def authenticate(self, authorization: str) -> Principal:
        """Who sends a request, from its ``Authorization`` header. Raises InvalidKey, TenantSuspended."""
        scheme, _, secret = authorization.partition(" ")
        if not authorization:
            raise InvalidKey("missing")
        if scheme.lower() != "bearer" or not secret.strip():
            raise InvalidKey("malformed")
        return await self._tenants.principal(secret.strip())

    async def open(self, principal: Principal, ask: Ask, request_id: RequestId) -> Run:
        """Hold the first step and wait for the first piece. Raises any Refusal, StoreUnavailable or EngineError."""
        self._redo.check()
        priced = await self.price(principal, ask)
        catalog = self.catalog_holder.current
        admitting = self.settler.keep(
            self._admission.admit(
                principal, priced.model, catalog, request_id, len(priced.prompt_token_ids), priced.max_tokens
            )
        )
        try:
            hold = await asyncio.shield(admitting)
        except asyncio.CancelledError:
            admitting.add_done_callback(self._release)
            raise
        run = Run(self._surroundings, priced.model, hold, self._job(priced, ask, hold))
        self._track(run)
        run.end_within(self._answer_timeout_s)
        if self._is_stopped:
            run.cut()
        await run.begin()
        return run

    async def price(self, principal: Principal, ask: Ask) -> Priced:
        """Find the model and encode the prompt. Raises UnknownModel, ModelNotAllowed, ContextTooLong."""
        model = self.catalog_holder.current.find(ask.model, principal.tenant.id, principal.key.models)
        prompt = await self._encode(ask.prompt)
        room = self._max_context_tokens - len(prompt)
        if not prompt:
            raise RequestRejected("the prompt is empty")
        if room < 1:
            raise ContextTooLong(
                f"the prompt has {len(prompt)} tokens and this model's context ends at "
                f"{self._max_context_tokens}: shorten it"
            )
        return Priced(model, prompt, min(ask.max_tokens or room, room) * ask.sampling.n)

    async def quote(self, principal: Principal, ask: Ask) -> tuple[Priced, Quote]:
        """What a request would hold and whether it would be admitted; changes nothing."""
        priced = await self.price(principal, ask)
        quote = await self._admission.quote(
            principal, priced.model, self.catalog_holder.current, len(priced.prompt_token_ids), priced.max_tokens
        )
        return priced, quote

    def start(self) -> None:
        """Start the loops that keep leases, deadlines and the spool moving."""
        self._loops = [
            asyncio.create_task(self.leases.run()),
            asyncio.create_task(self._extend_for_ever()),
            asyncio.create_task(self.settler.replay_for_ever()),
            asyncio.create_task(self._redo.run()),
            asyncio.create_task(self._load.run()),
            asyncio.create_task(self.address_sketches.run()),
        ]

    async def stop(self) -> None:
        """End what is open at what was delivered, and wait for it; bounded by STOP_TIMEOUT_S. Once is enough."""
        if self._is_stopped:
            return
        self._is_stopped = True
        for run in list(self._runs.values()):
            run.cut()
        await self.settler.wait(STOP_TIMEOUT_S)
        self.metrics.publish()
        for loop in self._loops:
            loop.cancel()
        if self._loops:
            await asyncio.wait(self._loops, timeout=STOP_TIMEOUT_S)
        self.settler.close()

    def check(self) -> None:
        """Raises AssertionError where a loop has ended: this gateway must be replaced."""
        assert self._is_stopped or not any(loop.done() for loop in self._loops), (
            "a gateway's loop never ends on its own"
        )

    @property
    def open_runs(self) -> int:
        return len(self._runs)

    def lose(self, request_ids: frozenset[RequestId]) -> None:
        """The store says that these holds are gone."""
        for request_id in request_ids:
            if run := self._runs.get(request_id):
                run.lose()

    async def _encode(self, prompt: Prompt) -> tuple[int, ...]:
        if isinstance(prompt, tuple):
            if any(not 0 <= token < self.text.vocab_size for token in prompt):
                raise RequestRejected(f"a token id lies outside the vocabulary of {self.text.vocab_size}")
            return prompt
        encode = self.text.encode if isinstance(prompt, str) else self.text.chat
        length = len(prompt) if isinstance(prompt, str) else sum(len(m["content"]) for m in prompt)
        if length > LONG_PROMPT_CHARS:
            return await asyncio.to_thread(encode, prompt)  # type: ignore[arg-type]
        return encode(prompt)  # type: ignore[arg-type]

    def _job(self, priced: Priced, ask: Ask, hold: Hold) -> GenerateRequest:
        model = priced.model
        return GenerateRequest(
            request_id=hold.request.request_id,
            prompt_token_ids=priced.prompt_token_ids,
            sampling=replace(ask.sampling, max_tokens=max(1, hold.max_tokens // ask.sampling.n)),
            adapter=AdapterRef(model.id, model.digest, model.path) if model.is_adapter else None,
            fairness_key=hold.request.tenant,
            fairness_weight=plan.weight if (plan := self.catalog_holder.current.plan_named(hold.request.plan)) else 1,
            time_to_live_s=self._lease_s,
        )

    def _track(self, run: Run) -> None:
        self._runs[run.request_id] = run
        self.leases.update(run.progress)
        self.metrics.open_holds(len(self._runs))

    def _untrack(self, run: Run) -> None:
        self._runs.pop(run.request_id, None)
        self.leases.drop(run.request_id)
        self.metrics.open_holds(len(self._runs))

    def _release(self, admitting: asyncio.Task[Hold]) -> None:
        """The client left while its hold was being made."""
        if not admitting.cancelled() and admitting.exception() is None:
            request = admitting.result().request
            self.settler.keep(self._ledger.void(request.request_id, request.tenant))

    async def _extend_for_ever(self) -> None:
        while True:
            await asyncio.sleep(self._checkpoint_s)
            try:
                self.metrics.publish()
                if self._runs:
                    for request_id in await self.link.extend(dict.fromkeys(self._runs, self._lease_s)):
                        if run := self._runs.get(RequestId(request_id)):
                            run.cut()
            except Exception:
                logger.exception("%d deadlines were not moved", len(self._runs))
