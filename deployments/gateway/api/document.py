"""The OpenAPI document: FastAPI's, with our own errors in place of its own."""

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse

from deployments.gateway.api.bodies import Problem
from deployments.gateway.api.dependencies import API_KEY
from deployments.gateway.api.errors import HTTP_ANSWERS, HTTP_CODES
from deployments.gateway.api.scopes import SCOPES

PROBLEM = "application/problem+json"
REF = "#/components/schemas/{model}"
Responses = dict[int | str, dict[str, Any]]


def refusals(*statuses: int) -> Responses:
    """The ``responses`` of a route that can be refused with these statuses."""
    content = {PROBLEM: {"schema": {"$ref": REF.format(model=Problem.__name__)}}}
    return {status: {"description": _described(status), "content": content} for status in statuses}


def _described(status: int) -> str:
    codes = [answer.code for answer in HTTP_ANSWERS.values() if answer.status == status]
    codes += [HTTP_CODES[status][0]] if status in HTTP_CODES else []
    return " or ".join(f"`{code}`" for code in dict.fromkeys(codes))


def document_of(app: FastAPI) -> Mapping[str, Any]:
    """The application's document, made once, with our errors and scopes and without FastAPI's validation errors."""
    if not app.openapi_schema:
        made = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        schemas = made["components"]["schemas"]
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        problem = Problem.model_json_schema(ref_template=REF, mode="serialization")
        schemas |= problem.pop("$defs") | {Problem.__name__: problem}
        for operation in (operation for path in made["paths"].values() for operation in path.values()):
            if "application/json" in operation["responses"].get("422", {}).get("content", {}):
                del operation["responses"]["422"]
        for (method, path), scope in SCOPES.items():
            made["paths"][path][method.lower()]["security"] = [{API_KEY.scheme_name: [scope.value]}]
        app.openapi_schema = made
    return app.openapi_schema


async def openapi_json(request: Request) -> JSONResponse:
    """The document. It is public: it names no tenant, model or price."""
    return JSONResponse(document_of(request.app))
