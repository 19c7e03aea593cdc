"""The one table from refusal to status, and the one shape of an error's body.

Each body is problem+json (RFC 9457) at the top level plus OpenAI's ``error`` object.
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from billing.archive.errors import ArchiveUnavailable
from billing.catalog.errors import ModelNotAllowed, UnknownModel
from billing.dodo.errors import DodoRefused, DodoUnavailable, WebhookRejected
from billing.errors import BillingError, Refusal
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
from billing.money import format_usd
from billing.store.errors import ClockSkewError, StoreRefused, StoreUnavailable
from billing.tenants.errors import (
    CustomerTaken,
    InvalidKey,
    KeyNotRotated,
    KeysNotManaged,
    TenantExists,
    TenantSuspended,
    UnknownKey,
    UnknownTenant,
)
from deployments.gateway.api import ratelimits
from deployments.gateway.catalog_holder import NotConfigured
from deployments.gateway.gateway import ContextTooLong
from deployments.gateway.request_state import AnswerTimeout, LeaseLost
from deployments.gateway.services import services_of
from deployments.gateway.settlement import MeteringUnavailable
from deployments.inference import request as engine
from deployments.token_stream.link import ReplicaLost, SlowReader

logger = logging.getLogger(__name__)
Json = dict[str, object]


class Problem(JSONResponse):
    media_type = "application/problem+json"


class BadRequest(Refusal):
    """A malformed request; ``param`` names the field at fault."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class NotFound(Refusal):
    """Nothing of that name exists."""


class Conflict(Refusal):
    """What is asked for contradicts what is."""


class AdminDenied(Refusal):
    """The admin key is missing, wrong or not configured."""


@dataclass(frozen=True, slots=True)
class Answer:
    """How one kind of error is told. ``retry_after_s`` 0 sends no Retry-After."""

    status: int
    code: str
    type: str
    title: str
    retry_after_s: float = 0
    should_retry: bool | None = None
    """Overrides what clients do on their own with such a status."""
    told: str = ""
    """Said in place of the error's own words, which name our parts."""


INVALID, AUTH, DENIED, SERVER = "invalid_request_error", "authentication_error", "permission_error", "server_error"
QUOTA, RATE = "insufficient_quota", "rate_limit_error"
BROKEN = "something broke on our side; the request id helps us find it"
NO_STORE = "nothing is served while usage cannot be recorded: retry shortly"

ANSWERS: Mapping[type[BaseException], Answer] = {
    BadRequest: Answer(400, "invalid_request", INVALID, "Bad Request"),
    ContextTooLong: Answer(400, "context_length_exceeded", INVALID, "Context Too Long"),
    engine.RequestRejected: Answer(400, "invalid_request", INVALID, "Bad Request"),
    InvalidKey: Answer(401, "invalid_api_key", AUTH, "Unauthorized"),
    AdminDenied: Answer(401, "invalid_admin_key", AUTH, "Unauthorized"),
    WebhookRejected: Answer(401, "invalid_webhook", AUTH, "Unauthorized"),
    InsufficientCredits: Answer(402, "insufficient_credits", QUOTA, "Payment Required"),
    TenantSuspended: Answer(403, "tenant_suspended", DENIED, "Forbidden"),
    ModelNotAllowed: Answer(403, "model_not_allowed", DENIED, "Forbidden"),
    KeysNotManaged: Answer(403, "keys_not_managed", DENIED, "Forbidden"),
    UnknownModel: Answer(404, "model_not_found", INVALID, "Not Found"),
    UnknownTenant: Answer(404, "tenant_not_found", INVALID, "Not Found"),
    UnknownKey: Answer(404, "key_not_found", INVALID, "Not Found"),
    NotFound: Answer(404, "not_found", INVALID, "Not Found"),
    Conflict: Answer(409, "conflict", INVALID, "Conflict", should_retry=False),
    CustomerTaken: Answer(409, "customer_taken", INVALID, "Conflict", should_retry=False),
    TenantExists: Answer(409, "tenant_exists", INVALID, "Conflict", should_retry=False),
    KeyNotRotated: Answer(409, "key_not_rotated", INVALID, "Conflict", should_retry=False),
    SourceReused: Answer(409, "source_reused", INVALID, "Conflict", should_retry=False),
    GrantRefused: Answer(400, "grant_refused", INVALID, "Bad Request"),
    UnknownHold: Answer(503, "metering_unavailable", SERVER, "Metering Unavailable", retry_after_s=1),
    DuplicateRequest: Answer(409, "duplicate_request", INVALID, "Conflict", should_retry=False),
    IdempotencyKeyInUse: Answer(409, "idempotency_key_in_use", INVALID, "Conflict"),
    AnswerTooLarge: Answer(409, "idempotency_answer_too_large", INVALID, "Conflict", should_retry=False),
    AnswerIncomplete: Answer(409, "idempotency_answer_incomplete", INVALID, "Conflict", should_retry=False),
    IdempotencyKeyReused: Answer(422, "idempotency_key_reused", INVALID, "Unprocessable Content"),
    CreditOnHold: Answer(429, "credit_on_hold", QUOTA, "Credit On Hold"),
    SpendCapReached: Answer(402, "spend_cap_reached", QUOTA, "Spend Cap Reached"),
    RateLimited: Answer(429, "rate_limit_exceeded", RATE, "Too Many Requests"),
    SpoolFull: Answer(503, "metering_unavailable", SERVER, "Metering Unavailable", retry_after_s=5),
    StoreUnavailable: Answer(503, "metering_unavailable", SERVER, "Metering Unavailable", 1, told=NO_STORE),
    StoreRefused: Answer(503, "metering_unavailable", SERVER, "Metering Unavailable", 5, told=NO_STORE),
    ArchiveUnavailable: Answer(503, "archive_unavailable", SERVER, "Archive Unavailable", retry_after_s=5),
    DodoUnavailable: Answer(503, "payments_unavailable", SERVER, "Payments Unavailable", retry_after_s=5),
    DodoRefused: Answer(502, "payments_refused", SERVER, "Payments Refused", should_retry=False),
    NotConfigured: Answer(503, "not_ready", SERVER, "Not Ready", retry_after_s=1),
    MeteringUnavailable: Answer(503, "metering_unavailable", SERVER, "Metering Unavailable", retry_after_s=1),
    engine.Overloaded: Answer(503, "overloaded", SERVER, "Overloaded", retry_after_s=1),
    engine.AdapterRejected: Answer(503, "adapter_unavailable", SERVER, "Adapter Unavailable", should_retry=False),
    ReplicaLost: Answer(503, "replica_lost", SERVER, "Replica Lost", retry_after_s=1),
    SlowReader: Answer(408, "slow_reader", INVALID, "Request Timeout"),
    LeaseLost: Answer(503, "metering_unavailable", SERVER, "Metering Unavailable", retry_after_s=1),
    AnswerTimeout: Answer(504, "timeout", SERVER, "Gateway Timeout", should_retry=False),
    engine.EngineError: Answer(500, "engine_failed", SERVER, "Engine Failed"),
    Exception: Answer(500, "internal_error", SERVER, "Internal Server Error", told=BROKEN),
}
HTTP_CODES: Mapping[int, tuple[str, str]] = {
    400: ("invalid_request", "Bad Request"),
    404: ("not_found", "Not Found"),
    405: ("method_not_allowed", "Method Not Allowed"),
    413: ("request_too_large", "Content Too Large"),
}


def answer_for(error: BaseException) -> Answer:
    """The nearest ancestor's row."""
    return next(ANSWERS[kind] for kind in type(error).__mro__ if kind in ANSWERS)


def body_of(error: BaseException, top_up_url: str = "") -> Json:
    """The JSON body of any error but Starlette's own."""
    answer = answer_for(error)
    return problem(answer, answer.told or str(error), getattr(error, "param", None)) | _details(error, top_up_url)


def problem(answer: Answer, message: str, param: str | None = None) -> Json:
    return {
        "type": f"urn:farebox:problem:{answer.code.replace('_', '-')}",
        "title": answer.title,
        "status": answer.status,
        "detail": message,
        "error": {"message": message, "type": answer.type, "param": param, "code": answer.code},
    }


def _details(error: BaseException, top_up_url: str) -> Json:
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
    """Answer every error in the one shape; FastAPI's ``detail`` never leaves the house."""
    for kind in (BillingError, engine.EngineError, Exception):
        app.add_exception_handler(kind, _on_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http)


async def _on_error(request: Request, error: Exception) -> JSONResponse:
    services = services_of(request)
    answer = answer_for(error)
    services.gateway.metrics.refused(answer.code)
    if answer.code == "internal_error":
        logger.exception("unexpected error on %s %s", request.method, request.url.path, exc_info=error)
    elif isinstance(error, ClockSkewError):
        logger.critical("new requests are refused: %s", error)
    return Problem(body_of(error, services.top_up_url), answer.status, headers_of(error))


async def _on_invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where, said = ".".join(str(step) for step in first["loc"][1:]), str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "json_invalid":
        refusal = BadRequest("the body is not valid JSON")
    elif where:
        refusal = BadRequest(f"{where}: {said}", where)
    else:
        is_object = first["type"] not in ("missing", "model_attributes_type")
        refusal = BadRequest(said if is_object else "send one JSON object, with `Content-Type: application/json`")
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
    services_of(request).gateway.metrics.refused(code)
    body = problem(Answer(error.status_code, code, INVALID, title), message)
    return Problem(body, error.status_code, headers)


def _allowed(request: Request) -> list[str]:
    """Every method of a path: Starlette names those of the first route on it alone."""
    routes: list[APIRoute] = request.app.state.routes
    here = [route for route in routes if route.path_regex.match(request.scope["path"])]
    return sorted({method for route in here for method in route.methods or ()})
