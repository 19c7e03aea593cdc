"""OpenAI's routes: chat and text completions, whole or as server-sent events, quotes, and the models a key may use."""

import asyncio
import time
from collections.abc import AsyncGenerator
from typing import Annotated

from fastapi import APIRouter, Body
from fastapi.responses import JSONResponse, Response
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from billing.catalog.errors import UnknownModel
from billing.errors import BillingError
from billing.ledger.answers import Kept
from billing.money import format_usd
from billing.tenants.tenant import Principal
from billing.usage import RequestId, UsageRecord
from deployments.gateway.api import ratelimits
from deployments.gateway.api.bodies import (
    ChatCompletion,
    Incomplete,
    Listing,
    ModelBody,
    QuoteBody,
    TextCompletion,
    closing,
    modifiers,
)
from deployments.gateway.api.dependencies import Caller, GatewayDep, OurRequestId
from deployments.gateway.api.document import Responses, refusals
from deployments.gateway.api.errors import answer_for, problem_of
from deployments.gateway.api.idempotency import REPLAYED, Claim, Head, IdempotencyKey, Transcript, asked_under
from deployments.gateway.api.shape import Shape, event, merged
from deployments.gateway.api.wire import ChatRequest, CompletionRequest, QuoteRequest, Sampled
from deployments.gateway.gateway import Gateway
from deployments.gateway.request_state import RequestState
from deployments.inference.request import EngineError
from deployments.inference.text import Text

SSE = "text/event-stream"
EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
"""The schema of each event of a stream: its data is a chunk as JSON, and at last ``[DONE]``."""
ANSWERED: Responses = {
    200: {"content": {SSE: {"schema": EVENT}}, "description": "The answer, whole or as events"},
    **refusals(400, 402, 404, 409, 413, 422, 429, 500, 504),
}
UNBUFFERED = {"cache-control": "no-cache", "x-accel-buffering": "no"}

router = APIRouter(responses=refusals(401, 403, 503))


@router.post("/v1/chat/completions", response_model=ChatCompletion, responses=ANSWERED)
async def chat_completions(
    asked: ChatRequest, gateway: GatewayDep, caller: Caller, request_id: OurRequestId, key: IdempotencyKey
) -> Response:
    return await _answer(asked, gateway, caller, request_id, key)


@router.post("/v1/completions", response_model=TextCompletion, responses=ANSWERED)
async def completions(
    asked: CompletionRequest, gateway: GatewayDep, caller: Caller, request_id: OurRequestId, key: IdempotencyKey
) -> Response:
    return await _answer(asked, gateway, caller, request_id, key)


async def _answer(
    asked: Sampled, gateway: Gateway, caller: Principal, request_id: RequestId, key: str | None
) -> Response:
    parsed, text = asked.to_client_request(), gateway.parts.text
    claim = Claim(gateway.parts.answers, gateway.parts.settler, asked_under(key, caller, request_id, asked))
    try:
        if (kept := await claim.make()) is not None:
            return _repeat(kept, asked.is_streamed, text)
        state = await gateway.open(caller, parsed, request_id)
    except BaseException:
        claim.conclude(None)
        raise
    head = _head(state, is_chat=isinstance(asked, ChatRequest))
    return await (_stream(state, claim, head, text) if asked.is_streamed else _whole(state, claim, head, text))


async def _stream(state: RequestState, claim: Claim, head: Head, text: Text) -> Response:
    try:
        await claim.check()
        return EventStream(state, claim, head, text)
    except (Exception, asyncio.CancelledError) as error:
        state.end_with(error)
        claim.conclude(state)
        raise


class EventStream(StreamingResponse):
    """An answer as server-sent events. However the connection ends, the request and its claim do."""

    def __init__(self, state: RequestState, claim: Claim, head: Head, text: Text) -> None:
        self._state, self._claim = state, claim
        super().__init__(_events(state, claim, head, text), media_type=SSE, headers=_headers(state) | UNBUFFERED)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._state.cancel()  # does nothing after the last event
            self._claim.conclude(self._state)


async def _events(state: RequestState, claim: Claim, head: Head, text: Text) -> AsyncGenerator[str, None]:
    """Every delta, then usage and receipt, then ``[DONE]``: that one only once the record is on disk."""
    shape = Shape(head, text)
    yield shape.opening()
    try:
        async for delta in state.deltas():
            for choice in delta.choices:
                claim.add(choice)
                yield shape.delta(choice)
        await claim.stage_delivered(head, _incomplete(state))
        receipt = await state.settle()
    except (EngineError, BillingError) as error:
        yield event(problem_of(error).to_json())
        return
    yield shape.closing(closing(receipt.record, _incomplete(state)))


async def _whole(state: RequestState, claim: Claim, head: Head, text: Text) -> Response:
    """The answer, staged and then charged: it is charged only if it can be repeated, and repeated only if charged."""
    try:
        choices = merged(await state.collect())
        for choice in choices:
            claim.add(choice)
        await claim.stage(head, _incomplete(state))
        state.is_repeatable = claim.is_made
        record = (await state.settle(is_delivered=False)).record
    except (Exception, asyncio.CancelledError) as error:
        state.end_with(error)
        raise
    finally:
        claim.conclude(state)
    body = Shape(head, text).whole(choices, closing(record, _incomplete(state)))
    return JSONResponse(body, headers=_headers(state) | _costs(record))


def _repeat(kept: Kept, is_streamed: bool, text: Text) -> Response:
    """The stored answer of an idempotency key, as it was sent before."""
    transcript = Transcript.from_json(kept.answer)
    shape, record, choices = Shape(transcript.head, text), kept.record, transcript.pieces
    end = closing(record, transcript.incomplete)
    headers = REPLAYED | {"x-farebox-max-tokens": str(transcript.head.max_tokens)}
    if is_streamed:
        events = [shape.opening(), *map(shape.delta, choices), shape.closing(end)]
        return Response("".join(events), media_type=SSE, headers=headers | UNBUFFERED)
    return JSONResponse(shape.whole(merged(choices), end), headers=headers | _costs(record))


def _head(state: RequestState, is_chat: bool) -> Head:
    name = ("chatcmpl-" if is_chat else "cmpl-") + state.request_id.removeprefix("req_")
    sampling = state.request.sampling
    return Head(name, int(time.time()), state.model.id, is_chat, sampling.max_tokens, sampling.n)


def _incomplete(state: RequestState) -> Incomplete:
    """Why the answer is shorter than asked for, where credit is the reason."""
    reason = state.truncation_reason
    if reason is None:
        return {}
    return {"incomplete_details": {"reason": answer_for(reason).code, "message": str(reason)}}


def _costs(record: UsageRecord) -> dict[str, str]:
    return {
        "x-farebox-cost": format_usd(record.charged_nanos),
        "x-farebox-balance": format_usd(record.balance_nanos),
    }


def _headers(state: RequestState) -> dict[str, str]:
    """Known with the hold: the tokens that it pays for, and what is left of the limits."""
    headers = {"x-farebox-max-tokens": str(state.request.sampling.max_tokens)}
    return headers | ratelimits.of_hold(state.hold.request.limits, state.hold.limits_left)


@router.post("/v1/quote", responses=refusals(400, 404, 413))
async def quote(asked: Annotated[QuoteRequest, Body()], gateway: GatewayDep, caller: Caller) -> QuoteBody:
    """What the request would cost at most, and whether it would be admitted now. Nothing is held."""
    encoded, quoted = await gateway.quote(caller, asked.to_client_request())
    refusal = quoted.refusal
    return QuoteBody(
        model=encoded.model.id,
        adapter=encoded.model.identity,
        price_version=quoted.price_version,
        modifiers=modifiers(quoted),
        prompt_tokens=len(encoded.prompt_token_ids),
        max_tokens=encoded.max_tokens,
        max_cost_usd=format_usd(quoted.cost_nanos),
        affordable_tokens=quoted.max_tokens,
        covered_by_requests=quoted.covered_by_requests,
        admitted=quoted.is_admitted,
        refusal=None if refusal is None else problem_of(refusal).error,
    )


@router.get("/v1/models")
async def list_models(gateway: GatewayDep, caller: Caller) -> Listing[ModelBody]:
    models = gateway.parts.catalog_holder.current.open_to(caller.tenant.id, caller.key.models)
    return Listing(data=[ModelBody.of(model, gateway.config.base_model) for model in models])


@router.get("/v1/models/{model_id:path}", responses=refusals(404))
async def get_model(model_id: str, gateway: GatewayDep, caller: Caller) -> ModelBody:
    models = gateway.parts.catalog_holder.current.open_to(caller.tenant.id, caller.key.models)
    found = next((model for model in models if model.id == model_id), None)
    if found is None:
        raise UnknownModel(model_id)
    return ModelBody.of(found, gateway.config.base_model)
