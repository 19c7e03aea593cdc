"""Webhook deliveries that Dodo did not sign, or that hold what Dodo never sends: none may have an effect."""

import base64
import json
import random
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from standardwebhooks import Webhook

from tests.support.world import SECRET

Delivery = tuple[bytes, dict[str, str]]
Harm = Callable[[bytes, dict[str, str], random.Random], Delivery]
OTHER_SECRET = "whsec_" + base64.b64encode(b"another secret of thirty-two b.").decode()
SIGNATURE, STAMP, NAME = "webhook-signature", "webhook-timestamp", "webhook-id"


def forge(genuine: Delivery, chance: random.Random) -> Delivery:
    """Damage a genuine delivery, so that its signature does not fit."""
    body, headers = genuine
    return chance.choice(HARMS)(body, dict(headers), chance)


def malformed(chance: random.Random, number: int) -> Delivery:
    """A delivery with a right signature whose body is not as Dodo documents it."""
    body = chance.choice(ODDITIES)
    return signed(body, f"msg_odd_{number}", datetime.now(UTC))


def signed(body: bytes, webhook_id: str, moment: datetime, secret: str = SECRET) -> Delivery:
    signature = Webhook(secret).sign(webhook_id, moment, body.decode(errors="surrogateescape"))
    return body, {NAME: webhook_id, STAMP: str(int(moment.timestamp())), SIGNATURE: signature}


def _other_secret(body: bytes, headers: dict[str, str], _: random.Random) -> Delivery:
    return signed(body, headers[NAME], datetime.now(UTC), OTHER_SECRET)


def _other_body(body: bytes, headers: dict[str, str], chance: random.Random) -> Delivery:
    place = chance.randrange(len(body))
    return body[:place] + bytes([body[place] ^ (1 << chance.randrange(7))]) + body[place + 1 :], headers


def _longer_body(body: bytes, headers: dict[str, str], _: random.Random) -> Delivery:
    return body + b" ", headers


def _other_id(body: bytes, headers: dict[str, str], chance: random.Random) -> Delivery:
    return body, headers | {NAME: f"msg_{chance.getrandbits(64):x}"}


def _other_moment(body: bytes, headers: dict[str, str], chance: random.Random) -> Delivery:
    return body, headers | {STAMP: str(int(headers[STAMP]) + chance.choice((-1, 1, 60)))}


def _too_old(body: bytes, headers: dict[str, str], _: random.Random) -> Delivery:
    return signed(body, headers[NAME], datetime.now(UTC) - timedelta(minutes=6))


def _too_early(body: bytes, headers: dict[str, str], _: random.Random) -> Delivery:
    """An hour, so that it is early even after thousands of other deliveries."""
    return signed(body, headers[NAME], datetime.now(UTC) + timedelta(hours=1))


def _bad_moment(body: bytes, headers: dict[str, str], chance: random.Random) -> Delivery:
    words = ("", "now", "nan", "inf", "-1", "1e999", "9" * 400, "1.5", "0x10", "\u0661\u0662")
    return body, headers | {STAMP: chance.choice(words)}


def _bad_signature(body: bytes, headers: dict[str, str], chance: random.Random) -> Delivery:
    whole = headers[SIGNATURE]
    words = (
        "",
        "v1",
        "v1,",
        "v1,%%%",
        "v2," + whole[3:],
        whole[:-2],
        whole[3:],
        "v1,AAAA " * 200 + "v1,",
        "v1,\u00e9\u00e8",
    )
    return body, headers | {SIGNATURE: chance.choice(words)}


def _no_header(body: bytes, headers: dict[str, str], chance: random.Random) -> Delivery:
    del headers[chance.choice((NAME, STAMP, SIGNATURE))]
    return body, headers


def _no_body(_: bytes, headers: dict[str, str], chance: random.Random) -> Delivery:
    return chance.choice((b"", b"\xff\xfe\x00", b"null", b"{}", b"\x00" * 5_000)), headers


HARMS: tuple[Harm, ...] = (
    *(_other_secret, _other_body, _longer_body, _other_id, _other_moment, _too_old, _too_early),
    *(_bad_moment, _bad_signature, _no_header, _no_body),
)


def _body(data: object, kind: object = "payment.succeeded") -> bytes:
    return json.dumps({"type": kind, "business_id": "b", "timestamp": "2026-11-23T00:00:00Z", "data": data}).encode()


ODDITIES: tuple[bytes, ...] = (
    *(b"", b"no json", b"[]", b"7", b'"text"', b"null", b"{}", b"[" * 100_000, b'{"type": NaN}', b"\xc3\xa9"),
    _body(None),
    _body([]),
    _body("text"),
    _body({}, {"a": 1}),
    _body({}, None),
    _body({}, "subscription.renewed"),
    _body({"subscription_id": ["a"]}, "subscription.active"),
    _body({"subscription_id": "sub_nobody"}, "subscription.active"),
    _body({"refund_id": "ref_1", "payment_id": {}, "amount": "many"}, "refund.succeeded"),
    _body({"refund_id": "ref_1", "payment_id": "../../customers", "amount": 1e400}, "refund.succeeded"),
    _body({"payment_id": "pay_1", "status": "succeeded", "customer": None, "product_cart": "all"}),
    _body({"payment_id": "pay_1", "status": "succeeded", "customer": {"customer_id": 7}, "total_amount": "1e30"}),
    _body({"payment_id": "pay_1", "customer": {"customer_id": "c"}, "product_cart": [{"quantity": -1e99}]}),
    _body({"payment_id": "pay_1", "customer": {"customer_id": "c"}, "created_at": "99999-99-99", "total_amount": 1}),
    _body({"payment_id": "p" * 100_000, "customer": {"customer_id": "c" * 100_000}, "created_at": "0001-01-01"}),
    _body({"dispute_id": None, "payment_id": 1.5}, "dispute.lost"),
)
