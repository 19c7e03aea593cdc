"""Connections to whatever is the primary when they are made, and who says which one that is.

Knows sentinels; knows nothing of what travels.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from typing import Any, Generic, TypeVar, cast

import hiredis
from redis import exceptions
from redis.asyncio import BlockingConnectionPool, ConnectionPool, Redis
from redis.asyncio.connection import AbstractConnection, Connection, SSLConnection, UnixDomainSocketConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from billing.store.address import Address, Node
from billing.store.errors import StoreRefused

MAX_CONNECTIONS = 64
LATECOMERS_S = 0.05
"""How long, after a first answer, a second opinion is waited for."""
LOOKUP_S = 0.2

Find = Callable[[], Awaitable[Node]]
T = TypeVar("T")


class _Packed(AbstractConnection):
    """Writes commands with hiredis, as redis-py does for blocking clients only: a third of the cost of a hold."""

    def pack_command(self, *words: Any) -> list[bytes]:
        name, *rest = words
        return [hiredis.pack_command((*name.split(), *rest))]


class LocalConnection(_Packed, UnixDomainSocketConnection):
    """A connection to a server on this machine."""


class PrimaryConnection(_Packed, Connection):
    """A connection whose address is looked up each time it is made; one to a demoted primary is left."""

    def __init__(self, *, find: Find | None = None, **options: Any) -> None:
        super().__init__(**options)
        self._find = find

    async def _connect(self) -> None:
        if self._find is not None:
            node = await self._find()
            self.host, self.port = node.host, node.port
        await super()._connect()  # type: ignore[no-untyped-call]

    async def read_response(self, *args: Any, **options: Any) -> Any:
        try:
            return await super().read_response(*args, **options)
        except exceptions.ReadOnlyError as error:
            await self.disconnect(nowait=True)
            raise exceptions.ConnectionError("this node was the primary and is none any more") from error


class PrimaryTlsConnection(PrimaryConnection, SSLConnection):
    """The same with TLS."""


def pool(options: Mapping[str, Any], find: Find | None = None) -> BlockingConnectionPool:
    """Connections to one store, or to whatever ``find`` names. A command whose reply was lost is sent once more.

    Raises:
        StoreRefused: the options do not fit the kind of connection.
    """
    known = {"socket_timeout": None, "socket_connect_timeout": None, **options}
    kind = known.pop("connection_class", Connection)
    if issubclass(kind, Connection):
        kind = PrimaryTlsConnection if issubclass(kind, SSLConnection) else PrimaryConnection
        known["find"] = find
    elif issubclass(kind, UnixDomainSocketConnection):
        kind = LocalConnection
    known |= {"decode_responses": True, "retry": Retry(NoBackoff(), 1)}
    try:
        kind(**known)
    except TypeError as error:
        raise StoreRefused(f"REDIS_URL has an option that such a connection does not take: {error}") from None
    return BlockingConnectionPool(MAX_CONNECTIONS, None, kind, **known)


class Sentinels:
    """Asks all sentinels at once and believes the one that knows of the latest failover."""

    def __init__(self, address: Address, on_change: Callable[[], Awaitable[None]]) -> None:
        """``on_change`` ends idle connections: an old primary that comes back would take writes, and lose them."""
        self._service, self._on_change = address.service, on_change
        self._last: Node | None = None
        options = dict(address.sentinel_options or {})
        options.setdefault("socket_connect_timeout", LOOKUP_S)
        options.setdefault("socket_timeout", LOOKUP_S)
        options |= {"decode_responses": True, "retry": Retry(NoBackoff(), 0)}
        kind = options.pop("connection_class", Connection)
        pools = [ConnectionPool(kind, host=node.host, port=node.port, **options) for node in address.nodes]
        self._clients = [Redis.from_pool(pool) for pool in pools]
        self._lookup = Shared(self._ask)

    async def primary(self) -> Node:
        """The primary's address; any number of callers share one look-up.

        Raises:
            ConnectionError: no sentinel knows a primary.
        """
        return await self._lookup.result()

    async def _ask(self) -> Node:
        answers, problem = await first_answers(
            client.sentinel_master(self._service, return_responses=True) for client in self._clients
        )
        if not answers:
            raise exceptions.ConnectionError(f"no sentinel knows where the primary of {self._service!r} is{problem}")
        latest = max(cast(list[dict[str, Any]], answers), key=lambda state: int(state["config-epoch"]))
        node = Node(str(latest["ip"]), int(latest["port"]))
        if self._last not in (None, node):
            await self._on_change()
        self._last = node
        return node

    async def aclose(self) -> None:
        self._lookup.cancel()
        for client in self._clients:
            await client.aclose()


class Shared(Generic[T]):
    """Work that many wait for and that is done once at a time; it goes on when one of them leaves."""

    def __init__(self, work: Callable[[], Coroutine[None, None, T]]) -> None:
        self._work = work
        self._task: asyncio.Task[T] | None = None

    def start(self) -> asyncio.Task[T]:
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._work())
            self._task.add_done_callback(lambda task: task.cancelled() or task.exception())
        return self._task

    async def result(self) -> T:
        return await asyncio.shield(self.start())

    def cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()


async def first_answers(questions: Iterable[Awaitable[T]]) -> tuple[list[T], str]:
    """What those that are alive say: all that answer about when the first does; and what one of the others said."""
    tasks = [asyncio.ensure_future(question) for question in questions]
    deadline = asyncio.get_running_loop().time() + LOOKUP_S
    pending, found, problem = set(tasks), list[T](), ""
    try:
        while pending and (left := deadline - asyncio.get_running_loop().time()) > 0:
            done, pending = await asyncio.wait(pending, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            answers = [task.result() for task in done if task.exception() is None]
            problem = next((f": {task.exception()}" for task in done if task.exception()), problem)
            if answers and not found:
                deadline = asyncio.get_running_loop().time() + LATECOMERS_S
            found += answers
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return found, problem
