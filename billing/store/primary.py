"""Connections to the primary, whichever server that is when they are made, and the sentinels that name it."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from contextlib import suppress
from typing import Any, Generic, TypeVar, cast

import hiredis
from redis import exceptions
from redis.asyncio import BlockingConnectionPool, ConnectionPool, Redis
from redis.asyncio.connection import AbstractConnection, Connection, SSLConnection, UnixDomainSocketConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from billing.store.address import Address, Node
from billing.store.errors import StoreRefused
from billing.store.schema import CLIENT_NAME

MAX_CONNECTIONS = 64
LOOKUP_S = 0.2
"""The longest that sentinels or cluster nodes are asked for the primary."""
SECOND_ANSWER_S = 0.05
"""How long a second answer is awaited after the first, because a node that was cut off may answer first."""

Find = Callable[[], Awaitable[Node]]
T = TypeVar("T")


class _Named(AbstractConnection):
    """Packs commands with hiredis, as redis-py does for blocking clients only: a third of the cost of a hold.

    Each connection has a name, by which a migration finds out who still uses the store.
    """

    async def on_connect_check_health(self, check_health: bool = True) -> None:
        await super().on_connect_check_health(check_health)
        await self.send_command("CLIENT", "SETNAME", CLIENT_NAME, check_health=False)
        with suppress(exceptions.ResponseError):  # a hosted store may deny it
            await self.read_response()

    def pack_command(self, *words: Any) -> list[bytes]:
        name, *rest = words
        return [hiredis.pack_command((*name.split(), *rest))]


class LocalConnection(_Named, UnixDomainSocketConnection):
    """A connection to a server on this machine, over a unix socket."""


class PrimaryConnection(_Named, Connection):
    """A connection that looks its address up when it is made, and ends once its server is no longer the primary."""

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
            raise exceptions.ConnectionError("this node is no longer the primary") from error


class PrimaryTlsConnection(PrimaryConnection, SSLConnection):
    """The same with TLS."""


def pool(options: Mapping[str, Any], find: Find | None = None) -> BlockingConnectionPool:
    """Make a pool of connections to one server, or to the one that ``find`` names.

    A command whose reply was lost is sent once more.

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
    """Asks all sentinels at once; the answer with the highest epoch, that of the latest failover, counts."""

    def __init__(self, address: Address, on_change: Callable[[], Awaitable[None]]) -> None:
        """``on_change`` ends idle connections: an old primary that comes back would accept writes and lose them."""
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
    """Work that many callers await and that runs once at a time. It goes on if one of them is cancelled."""

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
    """Return the answers that come within ``SECOND_ANSWER_S`` of the first one, and one error of those that failed."""
    tasks = [asyncio.ensure_future(question) for question in questions]
    deadline = asyncio.get_running_loop().time() + LOOKUP_S
    pending, found, problem = set(tasks), list[T](), ""
    try:
        while pending and (left := deadline - asyncio.get_running_loop().time()) > 0:
            done, pending = await asyncio.wait(pending, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            answers = [task.result() for task in done if task.exception() is None]
            problem = next((f": {task.exception()}" for task in done if task.exception()), problem)
            if answers and not found:
                deadline = asyncio.get_running_loop().time() + SECOND_ANSWER_S
            found += answers
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return found, problem
