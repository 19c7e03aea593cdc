"""The course of a request: authenticate, hold credit, run, settle. And the tasks of a gateway beside its requests."""

import asyncio
import logging
from dataclasses import dataclass, replace

from billing.catalog.catalog import Model
from billing.ledger.account import Hold
from billing.ledger.admission import Quote
from billing.ledger.leases import Leases
from billing.tenants.errors import InvalidKey
from billing.tenants.tenant import Principal
from billing.usage import RequestId
from deployments.gateway.errors import ContextTooLong
from deployments.gateway.parts import GatewayConfig, GatewayParts
from deployments.gateway.request_state import RequestState
from deployments.inference.request import AdapterRef, GenerateRequest, RequestRejected, SamplingParams

LONG_PROMPT_CHARS = 2_000
"""Longer prompts are encoded in a thread, so that the event loop goes on."""
STOP_TIMEOUT_S = 20.0

logger = logging.getLogger(__name__)
Prompt = list[dict[str, str]] | str | tuple[int, ...]
"""A chat, a text, or token ids."""


@dataclass(frozen=True, slots=True)
class ClientRequest:
    """What a client asks for, parsed. The hold decides ``sampling.max_tokens``."""

    model: str
    prompt: Prompt
    sampling: SamplingParams
    max_tokens: int | None = None
    """``None``: as many as the context has room for."""


@dataclass(frozen=True, slots=True)
class EncodedRequest:
    """A client's request with its model and its prompt's tokens: it can be held or quoted."""

    model: Model
    prompt_token_ids: tuple[int, ...]
    max_tokens: int
    """Of all its answers together."""


class Gateway:
    """Admits requests, keeps track of those that run, and ends them when it shuts down."""

    def __init__(self, config: GatewayConfig, parts: GatewayParts) -> None:
        self.config, self.parts = config, parts
        self.leases = Leases(parts.ledger, self._lose_holds, config.checkpoint_s)
        self.tasks: list[asyncio.Task[None]] = []
        """What ``start`` started; each runs until ``stop``."""
        self._running: dict[RequestId, RequestState] = {}
        self._is_stopped = False

    async def authenticate(self, authorization: str) -> Principal:
        """The sender of a request, from its ``Authorization`` header. Raises InvalidKey, TenantSuspended."""
        scheme, _, secret = authorization.partition(" ")
        if not authorization:
            raise InvalidKey("missing")
        if scheme.lower() != "bearer" or not secret.strip():
            raise InvalidKey("malformed")
        return await self.parts.tenants.principal(secret.strip())

    async def open(self, principal: Principal, asked: ClientRequest, request_id: RequestId) -> RequestState:
        """Hold credit and wait for the first delta. Raises any Refusal, StoreUnavailable or EngineError."""
        self.parts.replay.check()
        encoded = await self.encode(principal, asked)
        hold = await self._hold(principal, encoded, request_id)
        request = self._generate_request(encoded, asked, hold)
        state = RequestState(self.parts, self.leases, encoded.model, hold, request, self._forget)
        self._running[request_id] = state
        self.parts.metrics.open_holds(len(self._running))
        if self._is_stopped:
            state.stop()
        await state.begin(self.config.answer_timeout_s)
        return state

    async def quote(self, principal: Principal, asked: ClientRequest) -> tuple[EncodedRequest, Quote]:
        """What a request would hold, and whether it would be admitted; changes nothing."""
        encoded = await self.encode(principal, asked)
        catalog, prompt_tokens = self.parts.catalog_holder.current, len(encoded.prompt_token_ids)
        quote = await self.parts.admission.quote(principal, encoded.model, catalog, prompt_tokens, encoded.max_tokens)
        return encoded, quote

    async def encode(self, principal: Principal, asked: ClientRequest) -> EncodedRequest:
        """Find the model and encode the prompt. Raises UnknownModel, ModelNotAllowed, ContextTooLong."""
        model = self.parts.catalog_holder.current.find(asked.model, principal.tenant.id, principal.key.models)
        prompt = await self._encode_prompt(asked.prompt)
        context = self.config.max_context_tokens
        room = context - len(prompt)
        if not prompt:
            raise RequestRejected("the prompt is empty")
        if room < 1:
            raise ContextTooLong(
                f"the prompt has {len(prompt)} tokens and this model's context ends at {context}: shorten it"
            )
        return EncodedRequest(model, prompt, min(asked.max_tokens or room, room) * asked.sampling.n)

    def start(self) -> None:
        """Start the tasks that renew leases, extend deadlines, replay the spool and measure the load."""
        parts = self.parts
        work = (
            self.leases.run(),
            self._extend_forever(),
            parts.settler.replay_forever(),
            parts.replay.run(),
            parts.load.run(),
            parts.address_sketches.run(),
        )
        self.tasks = [asyncio.create_task(one) for one in work]

    async def stop(self) -> None:
        """Stop every request, and wait until all are settled, at most STOP_TIMEOUT_S. A second call does nothing."""
        if self._is_stopped:
            return
        self._is_stopped = True
        for state in list(self._running.values()):
            state.stop()
        await self.parts.settler.wait(STOP_TIMEOUT_S)
        self.parts.metrics.publish()
        for task in self.tasks:
            task.cancel()
        if self.tasks:
            await asyncio.wait(self.tasks, timeout=STOP_TIMEOUT_S)
        self.parts.settler.close()

    def check(self) -> None:
        """Raises AssertionError where a task has ended: this gateway must be replaced."""
        assert self._is_stopped or not any(task.done() for task in self.tasks), "a gateway's background task has ended"

    @property
    def running(self) -> int:
        """Requests that are not settled yet."""
        return len(self._running)

    async def _hold(self, principal: Principal, encoded: EncodedRequest, request_id: RequestId) -> Hold:
        """Hold the credit of a request. A client that disconnects meanwhile leaves no hold behind."""
        catalog, prompt_tokens = self.parts.catalog_holder.current, len(encoded.prompt_token_ids)
        admitting = self.parts.settler.keep(
            self.parts.admission.admit(principal, encoded.model, catalog, request_id, prompt_tokens, encoded.max_tokens)
        )
        try:
            return await asyncio.shield(admitting)
        except asyncio.CancelledError:
            admitting.add_done_callback(self._void)
            raise

    def _void(self, admitting: asyncio.Task[Hold]) -> None:
        if not admitting.cancelled() and admitting.exception() is None:
            request = admitting.result().request
            self.parts.settler.keep(self.parts.ledger.void(request.request_id, request.tenant))

    async def _encode_prompt(self, prompt: Prompt) -> tuple[int, ...]:
        text = self.parts.text
        if isinstance(prompt, tuple):
            if any(not 0 <= token < text.vocab_size for token in prompt):
                raise RequestRejected(f"a token id lies outside the vocabulary of {text.vocab_size}")
            return prompt
        encode = text.encode if isinstance(prompt, str) else text.chat
        length = len(prompt) if isinstance(prompt, str) else sum(len(m["content"]) for m in prompt)
        if length > LONG_PROMPT_CHARS:
            return await asyncio.to_thread(encode, prompt)  # type: ignore[arg-type]
        return encode(prompt)  # type: ignore[arg-type]

    def _generate_request(self, encoded: EncodedRequest, asked: ClientRequest, hold: Hold) -> GenerateRequest:
        model, plan = encoded.model, self.parts.catalog_holder.current.plan_named(hold.request.plan)
        return GenerateRequest(
            request_id=hold.request.request_id,
            prompt_token_ids=encoded.prompt_token_ids,
            sampling=replace(asked.sampling, max_tokens=max(1, hold.max_tokens // asked.sampling.n)),
            adapter=AdapterRef(model.id, model.digest, model.path) if model.is_adapter else None,
            fairness_key=hold.request.tenant,
            fairness_weight=plan.weight if plan else 1,
            time_to_live_s=self.config.lease_s,
        )

    def _forget(self, state: RequestState) -> None:
        self._running.pop(state.request_id, None)
        self.parts.metrics.open_holds(len(self._running))

    def _lose_holds(self, request_ids: frozenset[RequestId]) -> None:
        for request_id in request_ids:
            if state := self._running.get(request_id):
                state.lose_hold()

    async def _extend_forever(self) -> None:
        """Extend the deadlines of running requests, and stop those whose client does not read."""
        while True:
            await asyncio.sleep(self.config.checkpoint_s)
            try:
                self.parts.metrics.task_failures(self.leases.failures + self.parts.replay.failures)
                self.parts.metrics.publish()
                if self._running:
                    deadlines: dict[str, float] = dict.fromkeys(self._running, self.config.lease_s)
                    for request_id in await self.parts.link.extend(deadlines):
                        if state := self._running.get(RequestId(request_id)):
                            state.stop()
            except Exception:
                logger.exception("the deadlines of %d requests were not extended", len(self._running))
