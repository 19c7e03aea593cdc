"""The one table from errors to HTTP, by the feature that raises them; their bodies are ``bodies.Problem``."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from billing.archive.errors import ArchiveUnavailable
from billing.catalog.errors import ModelNotAllowed, UnknownModel
from billing.commerce.links import LinkInvalid, TooManyCheckouts, TopUp
from billing.dodo.errors import DodoRefused, DodoUnavailable, WebhookRejected
from billing.errors import BillingError
from billing.ledger.errors import (
    AnswerIncomplete,
    AnswerTooLarge,
    CreditOnHold,
    DuplicateRequest,
    GrantRefused,
    IdempotencyKeyInUse,
    IdempotencyKeyReused,
    InsufficientCredits,
    RateLimited,
    SourceReused,
    SpendCapReached,
    UnknownHold,
)
from billing.ledger.spool import SpoolFull
from billing.money import Nanos, format_usd
from billing.store.errors import ClockSkewError, StoreRefused, StoreUnavailable
from billing.tenants.errors import (
    CustomerTaken,
    InvalidKey,
    KeyNotRotated,
    ScopeMissing,
    ScopesRefused,
    TenantExists,
    TenantSuspended,
    UnknownKey,
    UnknownTenant,
)
from deployments.gateway.api import ratelimits
from deployments.gateway.api.bodies import ErrorBody, Problem
from deployments.gateway.api.dependencies import gateway_of
from deployments.gateway.errors import (
    AdminDenied,
    AnswerTimeout,
    BadRequest,
    Conflict,
    ContextTooLong,
    HoldLost,
    MeteringUnavailable,
    NotConfigured,
    NotFound,
)
from deployments.inference import request as engine
from deployments.token_stream.errors import ReplicaLost, SlowReader

logger = logging.getLogger(__name__)


class ProblemResponse(JSONResponse):
    media_type = "application/problem+json"


@dataclass(frozen=True, slots=True)
class HttpAnswer:
    """How one kind of error is answered. ``retry_after_s`` 0 sends no Retry-After."""

    status: int
    code: str
    type: str
    title: str
    retry_after_s: float = 0
    should_retry: bool | None = None
    """Overrides what clients do by themselves with such a status."""
    message: str = ""
    """In place of the error's own message, which names our parts."""


INVALID, AUTH, DENIED, SERVER = "invalid_request_error", "authentication_error", "permission_error", "server_error"
QUOTA, RATE = "insufficient_quota", "rate_limit_error"
INTERNAL = "something broke on our side; the request id helps us find it"
NO_STORE = "nothing is served while usage cannot be recorded: retry shortly"


def _bad_request(code: str = "invalid_request", title: str = "Bad Request") -> HttpAnswer:
    return HttpAnswer(400, code, INVALID, title)


def _unauthorized(code: str) -> HttpAnswer:
    return HttpAnswer(401, code, AUTH, "Unauthorized")


def _forbidden(code: str) -> HttpAnswer:
    return HttpAnswer(403, code, DENIED, "Forbidden")


def _not_found(code: str) -> HttpAnswer:
    return HttpAnswer(404, code, INVALID, "Not Found")


def _conflict(code: str) -> HttpAnswer:
    return HttpAnswer(409, code, INVALID, "Conflict", should_retry=False)


def _no_metering(retry_after_s: float, message: str = "") -> HttpAnswer:
    return HttpAnswer(503, "metering_unavailable", SERVER, "Metering Unavailable", retry_after_s, message=message)


HTTP_ANSWERS: Mapping[type[BaseException], HttpAnswer] = {
    # catalog
    UnknownModel: _not_found("model_not_found"),
    ModelNotAllowed: _forbidden("model_not_allowed"),
    # tenants
    InvalidKey: _unauthorized("invalid_api_key"),
    TenantSuspended: _forbidden("tenant_suspended"),
    ScopeMissing: _forbidden("scope_missing"),
    ScopesRefused: _bad_request(),
    UnknownTenant: _not_found("tenant_not_found"),
    UnknownKey: _not_found("key_not_found"),
    CustomerTaken: _conflict("customer_taken"),
    TenantExists: _conflict("tenant_exists"),
    KeyNotRotated: _conflict("key_not_rotated"),
    # ledger: admission
    InsufficientCredits: HttpAnswer(402, "insufficient_credits", QUOTA, "Payment Required"),
    SpendCapReached: HttpAnswer(402, "spend_cap_reached", QUOTA, "Spend Cap Reached"),
    CreditOnHold: HttpAnswer(429, "credit_on_hold", QUOTA, "Credit On Hold"),
    RateLimited: HttpAnswer(429, "rate_limit_exceeded", RATE, "Too Many Requests"),
    DuplicateRequest: _conflict("duplicate_request"),
    # ledger: movements
    GrantRefused: _bad_request("grant_refused"),
    SourceReused: _conflict("source_reused"),
    UnknownHold: _no_metering(1),
    SpoolFull: _no_metering(5),
    # ledger: idempotency
    IdempotencyKeyInUse: HttpAnswer(409, "idempotency_key_in_use", INVALID, "Conflict"),
    IdempotencyKeyReused: HttpAnswer(422, "idempotency_key_reused", INVALID, "Unprocessable Content"),
    AnswerTooLarge: _conflict("idempotency_answer_too_large"),
    AnswerIncomplete: _conflict("idempotency_answer_incomplete"),
    # store
    StoreUnavailable: _no_metering(1, NO_STORE),
    StoreRefused: _no_metering(5, NO_STORE),
    # archive
    ArchiveUnavailable: HttpAnswer(503, "archive_unavailable", SERVER, "Archive Unavailable", retry_after_s=5),
    # commerce
    LinkInvalid: _not_found("link_invalid"),
    TooManyCheckouts: HttpAnswer(429, "too_many_checkouts", RATE, "Too Many Requests"),
    # dodo
    WebhookRejected: _unauthorized("invalid_webhook"),
    DodoUnavailable: HttpAnswer(503, "payments_unavailable", SERVER, "Payments Unavailable", retry_after_s=5),
    DodoRefused: HttpAnswer(502, "payments_refused", SERVER, "Payments Refused", should_retry=False),
    # gateway
    BadRequest: _bad_request(),
    ContextTooLong: _bad_request("context_length_exceeded", "Context Too Long"),
    AdminDenied: _unauthorized("invalid_admin_key"),
    NotFound: _not_found("not_found"),
    Conflict: _conflict("conflict"),
    AnswerTimeout: HttpAnswer(504, "timeout", SERVER, "Gateway Timeout", should_retry=False),
    HoldLost: _no_metering(1),
    MeteringUnavailable: _no_metering(1),
    NotConfigured: HttpAnswer(503, "not_ready", SERVER, "Not Ready", retry_after_s=1),
    # token stream
    ReplicaLost: HttpAnswer(503, "replica_lost", SERVER, "Replica Lost", retry_after_s=1),
    SlowReader: HttpAnswer(408, "slow_reader", INVALID, "Request Timeout"),
    # engine
    engine.RequestRejected: _bad_request(),
    engine.Overloaded: HttpAnswer(503, "overloaded", SERVER, "Overloaded", retry_after_s=1),
    engine.AdapterRejected: HttpAnswer(503, "adapter_unavailable", SERVER, "Adapter Unavailable", should_retry=False),
    engine.EngineError: HttpAnswer(500, "engine_failed", SERVER, "Engine Failed"),
    # our own bugs
    Exception: HttpAnswer(500, "internal_error", SERVER, "Internal Server Error", message=INTERNAL),
}
HTTP_CODES: Mapping[int, tuple[str, str]] = {
    400: ("invalid_request", "Bad Request"),
    404: ("not_found", "Not Found"),
    405: ("method_not_allowed", "Method Not Allowed"),
    413: ("request_too_large", "Content Too Large"),
}


def answer_for(error: BaseException) -> HttpAnswer:
    """The answer of the error's class, or of its nearest base class in the table."""
    return next(HTTP_ANSWERS[kind] for kind in type(error).__mro__ if kind in HTTP_ANSWERS)


def problem_of(error: BaseException, top_up_url: str = "") -> Problem:
    """The body of any error but Starlette's own."""
    answer = answer_for(error)
    message = answer.message or str(error)
    return _problem(answer, message, getattr(error, "param", None), **_details(error, top_up_url))


def _problem(answer: HttpAnswer, message: str, param: str | None = None, **details: Any) -> Problem:
    return Problem(
        type=f"urn:farebox:problem:{answer.code.replace('_', '-')}",
        title=answer.title,
        status=answer.status,
        detail=message,
        error=ErrorBody(message=message, type=answer.type, param=param, code=answer.code),
        **details,
    )


def _details(error: BaseException, top_up_url: str) -> dict[str, object]:
    """The fields of ``Problem`` that only some errors have."""
    if isinstance(error, InsufficientCredits):
        return {
            "balance": format_usd(error.balance_nanos),
            "required": format_usd(error.required_nanos),
            "currency": "USD",
            "max_affordable_tokens": error.max_affordable_tokens,
            "limit_source": error.limit_source,
            "top_up_url": top_up_url,
        }
    if isinstance(error, CreditOnHold):
        return {
            "balance": format_usd(error.balance_nanos),
            "held": format_usd(error.held_nanos),
            "required": format_usd(error.required_nanos),
            "currency": "USD",
        }
    if isinstance(error, AnswerTooLarge | AnswerIncomplete):
        return {"record_id": error.record_id}
    if isinstance(error, SpendCapReached):
        return {
            "limit_source": f"key_{error.window}",
            "cap": format_usd(error.cap_nanos),
            "spent": format_usd(error.spent_nanos),
            "currency": "USD",
            "resets_at": error.resets_at,
        }
    if isinstance(error, RateLimited):
        return {"limit": error.limit, "limit_source": error.kind}
    return {}


def headers_of(error: BaseException) -> dict[str, str]:
    answer, headers = answer_for(error), {}
    wait = getattr(error, "retry_after_s", 0) or answer.retry_after_s
    if wait:
        headers["retry-after"] = str(max(1, math.ceil(wait)))
        headers["retry-after-ms"] = str(max(1, math.ceil(wait * 1000)))
    if answer.should_retry is not None:
        headers["x-should-retry"] = "true" if answer.should_retry else "false"
    if isinstance(error, RateLimited):
        headers |= ratelimits.of_refusal(error)
    if answer.status == 401:
        headers["www-authenticate"] = "Bearer"
    return headers


def install(app: FastAPI) -> None:
    """Answer every error with a ``Problem``, FastAPI's own errors too."""
    for kind in (BillingError, engine.EngineError, Exception):
        app.add_exception_handler(kind, _on_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http)


async def _on_error(request: Request, error: Exception) -> JSONResponse:
    gateway = gateway_of(request)
    answer = answer_for(error)
    gateway.parts.metrics.refused(answer.code)
    if answer.code == "internal_error":
        logger.exception("unexpected error on %s %s", request.method, request.url.path, exc_info=error)
    elif isinstance(error, ClockSkewError):
        logger.critical("new requests are refused: %s", error)
    body = problem_of(error, await _top_up_url(request, error))
    return ProblemResponse(body.to_json(), answer.status, headers_of(error))


async def _top_up_url(request: Request, error: Exception) -> str:
    """Where this tenant buys the smallest pack that helps; the API's own route while the store does not answer."""
    if not isinstance(error, InsufficientCredits):
        return ""
    gateway = gateway_of(request)
    link = TopUp(request.scope["farebox.tenant"], Nanos(error.required_nanos - error.balance_nanos))
    try:
        return gateway.config.top_up_url(await gateway.parts.links.write(link))
    except StoreUnavailable:
        return gateway.config.checkout_url


async def _on_invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where, message = ".".join(str(step) for step in first["loc"][1:]), str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "json_invalid":
        refusal = BadRequest("the body is not valid JSON")
    elif where:
        refusal = BadRequest(f"{where}: {message}", where)
    else:
        is_object = first["type"] not in ("missing", "model_attributes_type")
        refusal = BadRequest(message if is_object else "send one JSON object, with `Content-Type: application/json`")
    return await _on_error(request, refusal)


async def _on_http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    code, title = HTTP_CODES.get(error.status_code, ("http_error", "Error"))
    messages = {
        404: f"no such path: {request.url.path}",
        405: f"{request.method} is not allowed on {request.url.path}",
        400: "the body cannot be read: send one JSON object in UTF-8, without deep nesting or endless numbers",
    }
    message = messages.get(error.status_code, str(error.detail))
    headers = {name.lower(): value for name, value in (error.headers or {}).items()}
    if error.status_code == 405:
        headers["allow"] = ", ".join(_allowed(request))
    gateway_of(request).parts.metrics.refused(code)
    body = _problem(HttpAnswer(error.status_code, code, INVALID, title), message)
    return ProblemResponse(body.to_json(), error.status_code, headers)


def _allowed(request: Request) -> list[str]:
    """Every method of a path: Starlette lists only those of the first route that matches it."""
    routes: list[APIRoute] = request.app.state.routes
    here = [route for route in routes if route.path_regex.match(request.scope["path"])]
    return sorted({method for route in here for method in route.methods or ()})
