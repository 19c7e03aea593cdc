"""The Gateway's ASGI application: the routers, the error table and our own edge, around one ``Services``."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.types import ASGIApp

from deployments.api import account, admin, errors, health, openai, webhook
from deployments.edge import Front
from deployments.services import Services


def make_app(services: Services) -> ASGIApp:
    """One app for one gateway process; nothing global. Its lifespan starts and drains the gateway."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None, None]:
        services.gateway.start()
        yield
        await services.gateway.stop()

    app = FastAPI(title="Farebox", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.services = services
    for module in (openai, account, admin, webhook, health):
        app.include_router(module.router)
    errors.install(app)
    return Front(app, services.max_body_bytes)
