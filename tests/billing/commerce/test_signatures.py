"""Only what Dodo signed just now, byte for byte, is read at all."""

from datetime import UTC, datetime

import pytest
from standardwebhooks import Webhook

from billing.dodo.errors import WebhookRejected
from billing.store.keys import INBOX
from billing.usage import TenantId
from tests.support.world import API_KEY, SECRET, World, delivery

ACME = TenantId("acme")
USD = 1_000_000_000
AUTH = {"Authorization": f"Bearer {API_KEY}"}


def _tampered() -> list[tuple[str, bytes, dict[str, str]]]:
    body, headers = delivery("payment.succeeded", {"payment_id": "pay_1"})
    signature = headers["webhook-signature"]

    def but(**changes: str) -> dict[str, str]:
        return headers | {name.replace("_", "-"): value for name, value in changes.items()}

    return [
        ("another body", body + b" ", headers),
        ("another secret", *delivery("payment.succeeded", {}, secret="whsec_" + "b3RoZXI0" * 4)),
        ("no headers", body, {}),
        ("no id", body, {k: v for k, v in headers.items() if k != "webhook-id"}),
        ("another id", body, but(webhook_id="msg_2")),
        ("empty signature", body, but(webhook_signature="")),
        ("no version", body, but(webhook_signature=signature.removeprefix("v1,"))),
        ("no base64", body, but(webhook_signature="v1,a")),
        ("not ASCII", body, but(webhook_signature="v1,\u00e9\u00e9\u00e9")),
        ("unknown version", body, but(webhook_signature=signature.replace("v1", "v2"))),
        ("too many commas", body, but(webhook_signature=signature + ",x")),
        ("no number", body, but(webhook_timestamp="soon")),
        ("infinite", body, but(webhook_timestamp="inf")),
        ("old", body, but(webhook_timestamp="1000000000")),
        ("no UTF-8", b"\xff\xfe", headers),
        ("empty body", b"", headers),
    ]


@pytest.mark.parametrize(("why", "body", "headers"), _tampered(), ids=[why for why, _, _ in _tampered()])
async def test_unverified_delivery_is_rejected(world: World, why: str, body: bytes, headers: dict[str, str]) -> None:
    with pytest.raises(WebhookRejected):
        await world.webhooks().receive(body, headers)
    assert await world.redis.hlen(INBOX) == 0


async def test_deeply_nested_body_is_rejected(world: World) -> None:
    body, now = b"[" * 100_000, datetime.now(UTC)
    headers = delivery("made.up", {})[1] | {"webhook-timestamp": str(int(now.timestamp()))}
    headers["webhook-signature"] = Webhook(SECRET).sign(headers["webhook-id"], now, body.decode())
    with pytest.raises(WebhookRejected, match="no JSON"):
        await world.webhooks().receive(body, headers)


async def test_header_names_may_come_in_any_case(world: World) -> None:
    body, headers = delivery("made.up", {})
    kept = await world.webhooks().receive(body, {name.title(): value for name, value in headers.items()})
    assert kept.id == "msg_1"
