"""Dodo's deliveries over HTTP: the raw bytes are verified, and a success is said only after the write."""

import base64
import json
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime

import httpx
import pytest
from deployments.gateway.services import Services
from redis.asyncio import Redis
from standardwebhooks import Webhook

from billing.store import keys
from deployments.gateway.api.application import make_app
from tests.deployments.gateway.api.test_refusals import check
from tests.support.gateway import MakeServices
from tests.support.scripted import ScriptedLink

SECRET = "whsec_" + base64.b64encode(b"0123456789abcdef0123456789abcdef").decode()
ENVIRON = {
    "DODO_PAYMENTS_API_KEY": "key",
    "DODO_PAYMENTS_WEBHOOK_KEY": SECRET,
    "DODO_PAYMENTS_BASE_URL": "http://127.0.0.1:9",
}


@pytest.fixture
async def client(redis: Redis, link: ScriptedLink, make_services: MakeServices) -> AsyncIterator[httpx.AsyncClient]:
    services: Services = make_services(redis, link, ENVIRON)
    transport = httpx.ASGITransport(app=make_app(services), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://farebox") as made:
        yield made
    await services.gateway.stop()
    assert services.dodo is not None
    await services.dodo.close()


def signed(body: bytes, webhook_id: str = "msg_1") -> dict[str, str]:

    now = int(time.time())
    signature = Webhook(SECRET).sign(webhook_id, datetime.fromtimestamp(now, UTC), body.decode())
    return {"webhook-id": webhook_id, "webhook-timestamp": str(now), "webhook-signature": signature}


BODY = json.dumps({"type": "something.new", "business_id": "b", "timestamp": "2026-11-23T00:00:00Z", "data": {}})


async def test_a_signed_delivery_is_kept_before_it_is_acknowledged(client: httpx.AsyncClient, redis: Redis) -> None:
    for _ in range(2):
        reply = await client.post("/webhooks/dodo", content=BODY.encode(), headers=signed(BODY.encode()))
        assert reply.status_code == 200, reply.text
    assert await redis.hlen(keys.INBOX) == 1


@pytest.mark.parametrize("harm", ["body", "signature", "no headers", "other id"])
async def test_a_delivery_that_does_not_verify_is_refused(client: httpx.AsyncClient, redis: Redis, harm: str) -> None:
    headers, body = signed(BODY.encode()), BODY.encode()
    if harm == "body":
        body += b" "
    elif harm == "signature":
        headers["webhook-signature"] = "v1," + base64.b64encode(b"0" * 32).decode()
    elif harm == "other id":
        headers["webhook-id"] = "msg_2"
    else:
        headers = {}
    check(await client.post("/webhooks/dodo", content=body, headers=headers), 401, "invalid_webhook")
    assert await redis.hlen(keys.INBOX) == 0
