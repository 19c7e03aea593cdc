"""The Gateway's ASGI application: every route, the errors and ``edge.Front``, around one ``Gateway``."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.types import ASGIApp, Lifespan

from deployments.gateway.api import account, admin, errors, health, keys, openai, pages, refills, shop, webhook
from deployments.gateway.api.document import openapi_json
from deployments.gateway.edge import Front
from deployments.gateway.gateway import Gateway


def make_app(gateway: Gateway) -> ASGIApp:
    """The application of one gateway. Its lifespan starts and stops the gateway."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None, None]:
        gateway.start()
        yield
        await gateway.stop()

    app = make_routes(lifespan)
    app.state.gateway = gateway
    return Front(app, gateway.config.max_body_bytes)


def make_routes(lifespan: Lifespan[FastAPI] | None = None) -> FastAPI:
    """Every route and error without a gateway: enough for the OpenAPI document."""
    app = FastAPI(
        title="Farebox", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False
    )
    routers = [module.router for module in (openai, account, shop, pages, refills, keys, admin, webhook, health)]
    routers.append(keys.operators)
    for router in routers:
        app.include_router(router)
    app.state.routes = [route for router in routers for route in router.routes]
    app.add_api_route("/openapi.json", openapi_json, include_in_schema=False)
    errors.install(app)
    return app
