"""OpenAI's routes: chat and text completions, JSON and SSE, and the models a key may use.

Knows OpenAI's shapes; what a request costs and how it runs is the gateway's business.
"""

import json
import time
from collections.abc import AsyncGenerator, Mapping
from typing import Annotated

from fastapi import APIRouter, Body
from fastapi.responses import JSONResponse, Response
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from billing.account import Receipt
from billing.catalogue import Model
from billing.errors import BillingError, UnknownModel
from billing.money import format_usd
from deployments.api.account import draw_json
from deployments.api.errors import answer_for, body_of
from deployments.api.wire import ChatRequest, CompletionRequest, QuoteRequest, Sampled
from deployments.engine.request import EngineError, FinishReason
from deployments.run import Run
from deployments.services import Caller, OurId, Parts

router = APIRouter()


class _Shape:
    """How one endpoint writes its pieces."""

    def __init__(self, run: Run, is_chat: bool) -> None:
        kind = "chat.completion" if is_chat else "text_completion"
        self._is_chat = is_chat
        prefix = "chatcmpl-" if is_chat else "cmpl-"
        name = prefix + run.request_id.removeprefix("req_")
        base: dict[str, object] = {"id": name, "created": int(time.time()), "model": run.model.id}
        self._whole = base | {"object": kind}
        self._piece = base | {"object": "chat.completion.chunk" if is_chat else kind}

    def whole(self, text: str, run: Run, receipt: Receipt) -> dict[str, object]:
        content = {"message": {"role": "assistant", "content": text}} if self._is_chat else {"text": text}
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": _reason(run.finish_reason)}
        return self._whole | {"choices": [choice]} | _closing(run, receipt)

    def opening(self) -> str:
        """Chat streams begin with the role."""
        return self._event(self._choice({"role": "assistant", "content": ""}, None)) if self._is_chat else ""

    def piece(self, text: str, reason: FinishReason | None) -> str:
        if self._is_chat:
            return self._event(self._choice({"content": text} if text else {}, reason))
        return self._event({"index": 0, "text": text, "logprobs": None, "finish_reason": _reason(reason)})

    def closing(self, run: Run, receipt: Receipt) -> str:
        return _event(self._piece | {"choices": []} | _closing(run, receipt)) + "data: [DONE]\n\n"

    def _choice(self, delta: dict[str, str], reason: FinishReason | None) -> dict[str, object]:
        return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": _reason(reason)}

    def _event(self, choice: dict[str, object]) -> str:
        return _event(self._piece | {"choices": [choice]})


def _event(value: dict[str, object]) -> str:
    return f"data: {json.dumps(value, separators=(',', ':'), ensure_ascii=False)}\n\n"


def _reason(reason: FinishReason | None) -> str | None:
    return None if reason is None else reason.value


def _closing(run: Run, receipt: Receipt) -> dict[str, object]:
    usage, record = run.usage, receipt.record
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
            "adapter": record.adapter,
            "draws": [draw_json(draw) for draw in record.draws],
        },
        **_incomplete(run),
    }


def _incomplete(run: Run) -> dict[str, object]:
    """Why the answer is shorter than asked for, where credit is the reason."""
    if run.shortage is None:
        return {}
    return {"incomplete_details": {"reason": answer_for(run.shortage).code, "message": str(run.shortage)}}


class EventStream(StreamingResponse):
    """A run as server-sent events; however the connection ends, the run does."""

    def __init__(self, run: Run, shape: _Shape, headers: Mapping[str, str]) -> None:
        self._run = run
        super().__init__(
            _events(run, shape),
            media_type="text/event-stream",
            headers={**headers, "cache-control": "no-cache", "x-accel-buffering": "no"},
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._run.leave()


async def _events(run: Run, shape: _Shape) -> AsyncGenerator[str, None]:
    """Every piece, then usage and receipt, then ``[DONE]``: that one only after the record is on disk."""
    yield shape.opening()
    try:
        async for piece in run.pieces():
            yield shape.piece(piece.text, piece.finish_reason)
        receipt = await run.settle()
    except (EngineError, BillingError) as error:
        yield _event(body_of(error))
        return
    yield shape.closing(run, receipt)


@router.post("/v1/chat/completions")
async def chat_completions(asked: ChatRequest, parts: Parts, caller: Caller, our_id: OurId) -> Response:
    return await _answer(await parts.gateway.open(caller, asked.to_ask(), our_id), asked, is_chat=True)


@router.post("/v1/completions")
async def completions(asked: CompletionRequest, parts: Parts, caller: Caller, our_id: OurId) -> Response:
    return await _answer(await parts.gateway.open(caller, asked.to_ask(), our_id), asked, is_chat=False)


async def _answer(run: Run, asked: Sampled, is_chat: bool) -> Response:
    shape, headers = _Shape(run, is_chat), _headers(run)
    if asked.is_streamed:
        return EventStream(run, shape, headers)
    text, receipt = await run.collect()
    headers |= {
        "x-farebox-cost": format_usd(receipt.record.charged_nanos),
        "x-farebox-balance": format_usd(receipt.record.balance_nanos),
    }
    return JSONResponse(shape.whole(text, run, receipt), headers=headers)


def _headers(run: Run) -> dict[str, str]:
    """What is known at the hold: the tokens it pays for, and what is left of the limits."""
    headers = {"x-farebox-max-tokens": str(run.hold.max_tokens)}
    limits, left = run.hold.request.limits, run.hold.limits_left
    for name, limit, rest, reset_s in (
        ("requests", limits.requests_per_minute, left.requests, left.requests_reset_s),
        ("tokens", limits.tokens_per_minute, left.tokens, left.tokens_reset_s),
    ):
        if limit is not None and rest is not None:
            headers[f"x-ratelimit-limit-{name}"] = str(limit)
            headers[f"x-ratelimit-remaining-{name}"] = str(rest)
            headers[f"x-ratelimit-reset-{name}"] = f"{reset_s:.3f}s"
    return headers


@router.post("/v1/quote")
async def quote(asked: Annotated[QuoteRequest, Body()], parts: Parts, caller: Caller) -> JSONResponse:
    """What the request would cost at most, and whether it would be admitted now. Nothing is held."""
    priced, quoted = await parts.gateway.quote(caller, asked.to_ask())
    refusal = quoted.refusal
    return JSONResponse(
        {
            "object": "quote",
            "model": priced.model.id,
            "adapter": priced.model.identity,
            "price_version": priced.model.price.version,
            "prompt_tokens": len(priced.prompt_token_ids),
            "max_tokens": priced.max_tokens,
            "max_cost_usd": format_usd(quoted.cost_nanos),
            "affordable_tokens": quoted.max_tokens,
            "covered_by_requests": quoted.covered_by_requests,
            "admitted": quoted.is_admitted,
            "refusal": None if refusal is None else body_of(refusal, parts.top_up_url)["error"],
        }
    )


@router.get("/v1/models")
async def list_models(parts: Parts, caller: Caller) -> JSONResponse:
    models = parts.gateway.shelf.current.open_to(caller.tenant.id, caller.key.models)
    return JSONResponse({"object": "list", "data": [_model(model, parts.base_model) for model in models]})


@router.get("/v1/models/{model_id:path}")
async def get_model(model_id: str, parts: Parts, caller: Caller) -> JSONResponse:
    models = parts.gateway.shelf.current.open_to(caller.tenant.id, caller.key.models)
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
