"""OpenAI's routes: chat and text completions, JSON and SSE, and the models a key may use.

Knows OpenAI's shapes; what a request costs and how it runs is the gateway's business.
"""

import asyncio
import time
from collections.abc import AsyncGenerator
from dataclasses import asdict
from typing import Annotated

from fastapi import APIRouter, Body
from fastapi.responses import JSONResponse, Response
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from billing.catalog.catalog import Model
from billing.catalog.errors import UnknownModel
from billing.errors import BillingError
from billing.ledger.answers import Kept
from billing.money import format_usd
from billing.tenants.tenant import Principal
from billing.usage import RequestId, UsageRecord
from deployments.gateway.api import ratelimits
from deployments.gateway.api.account import draw_json
from deployments.gateway.api.bodies import ChatCompletion, Listing, ModelBody, QuoteBody, TextCompletion
from deployments.gateway.api.document import Responses, refusals
from deployments.gateway.api.errors import answer_for, body_of
from deployments.gateway.api.idempotency import REPLAYED, Claim, GivenKey, Head, Incomplete, Transcript, asked_under
from deployments.gateway.api.shape import Json, Shape, event, merged
from deployments.gateway.api.wire import ChatRequest, CompletionRequest, QuoteRequest, Sampled
from deployments.gateway.request_state import Run
from deployments.gateway.services import Caller, OurId, Parts, Services
from deployments.inference.request import EngineError
from deployments.inference.text import Text

SSE = "text/event-stream"
EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
"""What OpenAPI says of a stream is said of each event: its data is a chunk as JSON, and at last ``[DONE]``."""
ANSWERED: Responses = {
    200: {"content": {SSE: {"schema": EVENT}}, "description": "The answer, whole or as events"},
    **refusals(400, 402, 404, 409, 413, 422, 429, 500, 504),
}
UNBUFFERED = {"cache-control": "no-cache", "x-accel-buffering": "no"}

router = APIRouter(responses=refusals(401, 403, 503))


def _closing(record: UsageRecord, incomplete: Incomplete) -> Json:
    usage = record.usage
    return {
        "usage": {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "total_tokens": usage.total_tokens,
            "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        },
        "receipt": {
            "record_id": record.record_id,
            "cost_usd": format_usd(record.charged_nanos),
            "list_usd": format_usd(record.list_nanos),
            "balance_usd": format_usd(record.balance_nanos),
            "price_version": record.price_version,
            "modifiers": [asdict(modifier) for modifier in record.modifiers],
            "adapter": record.adapter,
            "draws": [draw_json(draw) for draw in record.draws],
        },
        **incomplete,
    }


def _incomplete(run: Run) -> Incomplete:
    """Why the answer is shorter than asked for, where credit is the reason."""
    if run.shortage is None:
        return {}
    return {"incomplete_details": {"reason": answer_for(run.shortage).code, "message": str(run.shortage)}}


class EventStream(StreamingResponse):
    """A run as server-sent events; however the connection ends, the run and its claim do."""

    def __init__(self, run: Run, claim: Claim, head: Head, text: Text) -> None:
        self._run, self._claim = run, claim
        super().__init__(_events(run, claim, head, text), media_type=SSE, headers=_headers(run) | UNBUFFERED)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._run.leave()
            self._claim.conclude(self._run)


async def _events(run: Run, claim: Claim, head: Head, text: Text) -> AsyncGenerator[str, None]:
    """Every piece, then usage and receipt, then ``[DONE]``: that one only after the record is on disk."""
    shape = Shape(head, text)
    yield shape.opening()
    try:
        async for piece in run.pieces():
            for choice in piece.choices:
                claim.add(choice)
                yield shape.piece(choice)
        await claim.stage_delivered(head, _incomplete(run))
        receipt = await run.settle()
    except (EngineError, BillingError) as error:
        yield event(body_of(error))
        return
    yield shape.closing(_closing(receipt.record, _incomplete(run)))


@router.post("/v1/chat/completions", response_model=ChatCompletion, responses=ANSWERED)
async def chat_completions(asked: ChatRequest, parts: Parts, caller: Caller, our_id: OurId, key: GivenKey) -> Response:
    return await _answer(asked, parts, caller, our_id, key)


@router.post("/v1/completions", response_model=TextCompletion, responses=ANSWERED)
async def completions(asked: CompletionRequest, parts: Parts, caller: Caller, our_id: OurId, key: GivenKey) -> Response:
    return await _answer(asked, parts, caller, our_id, key)


async def _answer(asked: Sampled, parts: Services, caller: Principal, our_id: RequestId, key: str | None) -> Response:
    ask = asked.to_ask()
    claim = Claim(parts.answers, parts.gateway.settler, asked_under(key, caller, our_id, asked))
    try:
        if (kept := await claim.make()) is not None:
            return _replay(kept, asked.is_streamed, parts.gateway.text)
        run = await parts.gateway.open(caller, ask, our_id)
    except BaseException:
        claim.conclude(None)
        raise
    head = _head(run, is_chat=isinstance(asked, ChatRequest))
    text = parts.gateway.text
    return await (_stream(run, claim, head, text) if asked.is_streamed else _whole(run, claim, head, text))


async def _stream(run: Run, claim: Claim, head: Head, text: Text) -> Response:
    is_ours = False
    try:
        await claim.check()
        is_ours = True
        return EventStream(run, claim, head, text)
    finally:
        if not is_ours:
            run.cut()
            claim.conclude(run)


async def _whole(run: Run, claim: Claim, head: Head, text: Text) -> Response:
    try:
        choices = merged(await run.collect())
        for choice in choices:
            claim.add(choice)
        record = await _charge(run, claim, head)
    finally:
        claim.conclude(run)
    headers = _headers(run) | _costs(record)
    closing = _closing(record, _incomplete(run))
    return JSONResponse(Shape(head, text).whole(choices, closing), headers=headers)


async def _charge(run: Run, claim: Claim, head: Head) -> UsageRecord:
    """Stage, then settle: an answer is charged only when it can be repeated, and repeated only when it was charged."""
    is_staged = False
    try:
        await claim.stage(head, _incomplete(run))
        is_staged = True
        run.is_kept = claim.is_made
    except asyncio.CancelledError:
        run.leave()
        raise
    finally:
        if not is_staged:
            run.cut()
    return (await run.settle(is_delivered=False)).record


def _replay(kept: Kept, is_streamed: bool, text: Text) -> Response:
    """A kept answer in the shape in which it was asked for."""
    transcript = Transcript.from_json(kept.answer)
    shape, record, pieces = Shape(transcript.head, text), kept.record, transcript.pieces
    closing = _closing(record, transcript.incomplete)
    headers = REPLAYED | {"x-farebox-max-tokens": str(transcript.head.max_tokens)}
    if is_streamed:
        events = [shape.opening(), *map(shape.piece, pieces), shape.closing(closing)]
        return Response("".join(events), media_type=SSE, headers=headers | UNBUFFERED)
    return JSONResponse(shape.whole(merged(pieces), closing), headers=headers | _costs(record))


def _head(run: Run, is_chat: bool) -> Head:
    name = ("chatcmpl-" if is_chat else "cmpl-") + run.request_id.removeprefix("req_")
    return Head(name, int(time.time()), run.model.id, is_chat, run.job.sampling.max_tokens, run.job.sampling.n)


def _costs(record: UsageRecord) -> dict[str, str]:
    return {
        "x-farebox-cost": format_usd(record.charged_nanos),
        "x-farebox-balance": format_usd(record.balance_nanos),
    }


def _headers(run: Run) -> dict[str, str]:
    """What is known at the hold: the tokens it pays for, and what is left of the limits."""
    headers = {"x-farebox-max-tokens": str(run.job.sampling.max_tokens)}
    return headers | ratelimits.of_hold(run.hold.request.limits, run.hold.limits_left)


@router.post("/v1/quote", response_model=QuoteBody, responses=refusals(400, 404, 413))
async def quote(asked: Annotated[QuoteRequest, Body()], parts: Parts, caller: Caller) -> JSONResponse:
    """What the request would cost at most, and whether it would be admitted now. Nothing is held."""
    priced, quoted = await parts.gateway.quote(caller, asked.to_ask())
    refusal = quoted.refusal
    return JSONResponse(
        {
            "object": "quote",
            "model": priced.model.id,
            "adapter": priced.model.identity,
            "price_version": quoted.price_version,
            "modifiers": [asdict(modifier) for modifier in quoted.modifiers],
            "prompt_tokens": len(priced.prompt_token_ids),
            "max_tokens": priced.max_tokens,
            "max_cost_usd": format_usd(quoted.cost_nanos),
            "affordable_tokens": quoted.max_tokens,
            "covered_by_requests": quoted.covered_by_requests,
            "admitted": quoted.is_admitted,
            "refusal": None if refusal is None else body_of(refusal, parts.top_up_url)["error"],
        }
    )


@router.get("/v1/models", response_model=Listing[ModelBody])
async def list_models(parts: Parts, caller: Caller) -> JSONResponse:
    models = parts.gateway.catalog_holder.current.open_to(caller.tenant.id, caller.key.models)
    return JSONResponse({"object": "list", "data": [_model(model, parts.base_model) for model in models]})


@router.get("/v1/models/{model_id:path}", response_model=ModelBody, responses=refusals(404))
async def get_model(model_id: str, parts: Parts, caller: Caller) -> JSONResponse:
    models = parts.gateway.catalog_holder.current.open_to(caller.tenant.id, caller.key.models)
    found = next((model for model in models if model.id == model_id), None)
    if found is None:
        raise UnknownModel(model_id)
    return JSONResponse(_model(found, parts.base_model))


def _model(model: Model, base_model: str) -> dict[str, object]:
    return {
        "id": model.id,
        "object": "model",
        "created": 0,
        "owned_by": "farebox",
        "root": base_model,
        "parent": base_model if model.is_adapter else None,
        "adapter": model.identity,
        "price": model.price.model_dump(mode="json"),
        "price_version": model.price.version,
    }
