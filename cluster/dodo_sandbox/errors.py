"""Errors in Dodo's shape: a status and a body of ``code`` and ``message``.

Codes are those of Dodo's error reference where it has one, else ours.
"""

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException


class ApiError(Exception):
    """An error that the caller gets as ``status`` and ``{"code", "message"}``."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(status, code, message)
        self.status = status
        self.code = code
        self.message = message


def bad_request(message: str, code: str = "INVALID_REQUEST_PARAMETERS") -> ApiError:
    return ApiError(400, code, message)


def not_found(what: str, resource_id: str) -> ApiError:
    return ApiError(404, f"{what.upper().replace(' ', '_')}_NOT_FOUND", f"{what.capitalize()} {resource_id} not found")


def unprocessable(message: str, code: str = "UNPROCESSABLE_ENTITY") -> ApiError:
    return ApiError(422, code, message)


def body(code: str, message: str) -> dict[str, str]:
    return {"code": code, "message": message}


def install(app: FastAPI) -> None:
    """Answer every error of ``app`` and of the framework in Dodo's shape."""

    @app.exception_handler(ApiError)
    async def refused(_: Request, error: ApiError) -> JSONResponse:
        return JSONResponse(body(error.code, error.message), error.status)

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        return JSONResponse(body("UNPROCESSABLE_ENTITY", f"{where}: {first['msg']}"), 422)

    @app.exception_handler(HTTPException)
    async def unrouted(_: Request, error: HTTPException) -> JSONResponse:
        code = {404: "NOT_FOUND", 405: "METHOD_NOT_ALLOWED"}.get(error.status_code, "ERROR")
        return JSONResponse(body(code, str(error.detail)), error.status_code, error.headers)
