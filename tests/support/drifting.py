"""An offline Dodo whose answers have other values than this version knows."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
from dodopayments import DefaultAsyncHttpxClient

from billing.dodo.client import Dodo
from billing.dodo.settings import DodoSettings
from tests.support.world import API_KEY, SECRET, World


class Drifting(httpx.AsyncHTTPTransport):
    """Answers of the offline Dodo in which, under some paths, fields have other values."""

    def __init__(self) -> None:
        super().__init__()
        self.fields: dict[str, dict[str, object]] = {}
        """By a part of the address. Of a list, the fields of the first item are replaced."""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        response = await super().handle_async_request(request)
        fields = {k: v for part, some in self.fields.items() if part in str(request.url) for k, v in some.items()}
        if not fields or not response.is_success:
            return response
        answer = json.loads(await response.aread())
        answer.get("items", [answer])[0].update(fields)
        return httpx.Response(response.status_code, json=answer)


@asynccontextmanager
async def drifting_dodo(world: World) -> AsyncIterator[Drifting]:
    """Put it between a world and its Dodo."""
    transport = Drifting()
    settings = DodoSettings(API_KEY, SECRET, base_url=str(world.operator.base_url).rstrip("/"))
    world.dodo = Dodo(settings, DefaultAsyncHttpxClient(transport=transport))
    try:
        yield transport
    finally:
        await world.dodo.close()
