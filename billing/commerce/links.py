"""Links for people who have no API key at hand: to a checkout, and to the page after paying.

A link carries a token that is encrypted and signed, so that it shows nothing, cannot be altered and ends by itself. All
gateways share its secret through the store. What a link may do is its type: ``TopUp`` opens checkouts, and ``Receipt``
shows what became of one checkout.
"""

import json
import time
from dataclasses import asdict, dataclass
from typing import TypeVar, cast

from cryptography.fernet import Fernet, InvalidToken
from redis.asyncio import Redis

from billing.clock import Clock, now_ms
from billing.errors import Refusal
from billing.money import Nanos
from billing.store.connection import guarded
from billing.store.keys import LINK_SECRET, shard_for
from billing.store.write import write
from billing.usage import TenantId

LIFETIME_S = 7 * 24 * 60 * 60
SECRET_CACHE_S = 60.0
"""How long a process trusts the secret that it has read: a store that lost it gets another."""
CHECKOUTS_PER_HOUR = 10
HOUR_S = 60 * 60


class LinkInvalid(Refusal):
    """The link was altered, or is too old, or is for something else."""

    def __str__(self) -> str:
        return "this link is not valid, or has expired: a new one is in `top_up_url` of each refusal for lack of credit"


@dataclass(eq=False)
class TooManyCheckouts(Refusal):
    """The links of one tenant have opened as many checkouts as they may in an hour."""

    retry_after_s: float

    def __str__(self) -> str:
        return (
            f"{CHECKOUTS_PER_HOUR} checkouts were opened from links within an hour: use one that is open, "
            f"or retry in {self.retry_after_s:g} s"
        )


@dataclass(frozen=True, slots=True)
class TopUp:
    """The right to open checkouts for one tenant, and to see what it may buy."""

    tenant: TenantId
    needed: Nanos = Nanos(0)
    """What the pack that is offered first should cover."""
    product: str = ""
    """What is offered first instead, such as ``pack:small``, where it is still sold."""


@dataclass(frozen=True, slots=True)
class Receipt:
    """The right to see what became of one checkout, and the balance after it."""

    tenant: TenantId
    product: str
    """Our name of what is bought, such as ``pack:small``."""
    product_id: str
    """Dodo's id of it."""


Link = TypeVar("Link", TopUp, Receipt)


class Links:
    """Makes and reads the tokens of links. One per process."""

    def __init__(self, redis: Redis, clock: Clock = now_ms) -> None:
        self._redis, self._clock = redis, clock
        self._known: Fernet | None = None
        self._trusted_until = 0.0

    async def write(self, link: TopUp | Receipt) -> str:
        """The token of a new link. Raises StoreUnavailable."""
        return self._token(await self._fernet(), link, self._clock() // 1000)

    async def write_from(self, token: str, link: TopUp | Receipt) -> str:
        """The token of a link that another leads to: it ends when that one ends."""
        fernet = await self._fernet()
        return self._token(fernet, link, fernet.extract_timestamp(_padded(token)))

    async def read(self, kind: type[Link], token: str) -> Link:
        """The link of a token. Raises LinkInvalid, StoreUnavailable."""
        try:
            fernet = await self._fernet()
            plain = fernet.decrypt_at_time(_padded(token), LIFETIME_S, self._clock() // 1000)
        except (InvalidToken, UnicodeEncodeError):
            raise LinkInvalid from None
        fields = json.loads(plain)
        if fields.pop("kind") != kind.__name__:
            raise LinkInvalid
        return kind(**fields)

    async def count_checkout(self, tenant: TenantId) -> None:
        """Count a checkout that is opened from a link. Raises TooManyCheckouts, StoreUnavailable."""
        name = shard_for(tenant).checkouts(tenant)
        async with guarded():
            _, count, left_s = await write(
                self._redis, ("SET", name, 0, "EX", HOUR_S, "NX"), ("INCR", name), ("TTL", name)
            )
        if int(count) > CHECKOUTS_PER_HOUR:
            raise TooManyCheckouts(max(1, int(left_s)))

    def _token(self, fernet: Fernet, link: TopUp | Receipt, at_s: int) -> str:
        plain = json.dumps({"kind": type(link).__name__, **asdict(link)})
        return fernet.encrypt_at_time(plain.encode(), at_s).decode().rstrip("=")

    async def _fernet(self) -> Fernet:
        now = time.monotonic()
        if self._known is None or now >= self._trusted_until:
            async with guarded():
                secret = cast(str | None, await self._redis.get(LINK_SECRET))
                if secret is None:
                    await write(self._redis, ("SET", LINK_SECRET, Fernet.generate_key().decode(), "NX"))
                    secret = str(await self._redis.get(LINK_SECRET))
            self._known, self._trusted_until = Fernet(secret), now + SECRET_CACHE_S
        return self._known


def _padded(token: str) -> bytes:
    """The token as it was encrypted. Links leave the padding out: mail programs end a link before it."""
    return (token + "=" * (-len(token) % 4)).encode()
