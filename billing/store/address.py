"""Reads ``REDIS_URL``: the address of one server, of a service that sentinels watch, or of a cluster.

No error repeats the address, which may contain a password.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any
from urllib.parse import urlsplit

from redis.asyncio.connection import parse_url

from billing.store.errors import StoreRefused

FORMS = (
    "redis://HOST:PORT, rediss://HOST:PORT (TLS), unix:///PATH, redis+sentinel://HOST:PORT,HOST:PORT/SERVICE "
    "or redis+cluster://HOST:PORT,HOST:PORT (rediss+... with TLS)"
)
DEFAULT_PORT = 6379
SENTINEL_PORT = 26379
Options = dict[str, Any]
"""Keyword arguments of redis-py's connections."""


class Shape(StrEnum):
    SINGLE = "single"
    """One server; it may turn out to be a node of a cluster."""
    SENTINEL = "sentinel"
    CLUSTER = "cluster"


@dataclass(frozen=True, slots=True)
class Node:
    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Address:
    """Where the store is, and the other options of its connections."""

    shape: Shape
    nodes: tuple[Node, ...]
    """The server, or the sentinels or cluster nodes to ask first; none for a unix socket."""
    options: Mapping[str, Any]
    service: str = ""
    """The name of the primary at its sentinels."""
    sentinel_options: Mapping[str, Any] | None = None


def parse(url: str) -> Address:
    """Raises StoreRefused if the address has none of the known forms."""
    scheme = url.partition("://")[0]
    base, _, shape = scheme.partition("+")
    try:
        if base in ("redis", "rediss") and shape in (Shape.SENTINEL, Shape.CLUSTER):
            return _many(url, base, Shape(shape))
        if scheme in ("redis", "rediss", "unix"):
            options: Options = {**parse_url(url)}
            nodes = () if scheme == "unix" else (_node(options, DEFAULT_PORT),)
            return Address(Shape.SINGLE, nodes, options)
    except ValueError as error:
        raise StoreRefused(f"REDIS_URL cannot be read ({error}): its forms are {FORMS}") from None
    raise StoreRefused(f"REDIS_URL begins with {scheme[:20]!r}: its forms are {FORMS}")


def _many(url: str, base: str, shape: Shape) -> Address:
    parts = urlsplit(url)
    user, at, hosts = parts.netloc.rpartition("@")
    service, _, db = parts.path.strip("/").partition("/")
    if shape is Shape.CLUSTER and (service or db):
        raise ValueError("a cluster has one database and no service name")
    if shape is Shape.SENTINEL and not service:
        raise ValueError("after the sentinels comes /SERVICE, the name of the store at its sentinels")
    each: list[Options] = [
        {**parse_url(f"{base}://{user}{at}{host}/{db}?{parts.query}")} for host in hosts.split(",") if host
    ]
    if not each:
        raise ValueError("it names no host")
    port = SENTINEL_PORT if shape is Shape.SENTINEL else DEFAULT_PORT
    nodes = tuple(_node(options, port) for options in each)
    options = each[0]
    named = {key.removeprefix("sentinel_"): options.pop(key) for key in _SENTINEL_LOGIN if key in options}
    asking = {key: value for key, value in options.items() if key.startswith(("ssl", "connection_class"))} | named
    return Address(shape, nodes, options, service, asking)


_SENTINEL_LOGIN = ("sentinel_username", "sentinel_password")


def _node(options: Options, default_port: int) -> Node:
    """Take host and port out of the options."""
    return Node(str(options.pop("host", "localhost")), int(options.pop("port", default_port)))
