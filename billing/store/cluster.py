"""A client of a Redis Cluster that is used like a client of one server: each command goes to the primary of its key.

Why not ``redis.asyncio.RedisCluster`` (8.1.0)? Measured beside this client on three nodes with a replica each:

* A primary hangs and its replica is promoted. Here the next call after the promotion is served, and calls before are
  refused after 0.25 s. There, without timeouts of its own, a call waits for 5 s and the new primary is never found,
  because a cancelled call does not make it look; with a timeout of 0.24 s a call is refused after 0.50 s.
* 1,000 calls at once for one shard: here all wait for their turn. There 900 fail at once (its pool does not wait).
* A node lost its scripts while another one hangs: here the script is sent again to that node alone, in 1 ms. There it
  is loaded into all primaries, so the call fails with the node that hangs.

It costs less CPU, however: 39 us a call at 32 callers, and 63 us here; as much as here (92 and 96 us) at one caller.
"""

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from redis import exceptions
from redis.asyncio import Redis
from redis.asyncio.client import Pipeline
from redis.commands.core import AsyncScript
from redis.crc import key_slot

from billing.store.address import DEFAULT_PORT, Address, Node
from billing.store.guard import waiting_for
from billing.store.primary import Shared, first_answers, pool

SLOTS = 16_384
_SCRIPTS = ("EVAL", "EVALSHA")
_KEYLESS = ("PING", "TIME", "INFO", "CONFIG GET", "WAIT")
_EVERYWHERE = ("FLUSHALL", "CONFIG SET")


@dataclass(frozen=True, slots=True)
class _View:
    """What one node says of the cluster."""

    is_ok: bool
    epoch: int
    ranges: tuple[tuple[int, int, Node], ...]


class Cluster(Redis):
    """A client of all primaries."""

    def __init__(self, address: Address) -> None:
        self._options = address.options
        self._clients: dict[Node, Redis] = {}
        self._owners: list[Node] = []
        self._seeds = address.nodes
        self._learning = Shared(self._learn)
        super().__init__(connection_pool=self.at(address.nodes[0]).connection_pool)

    async def learn(self) -> None:
        """Ask the nodes which primary has which slots. Raises ConnectionError if none answers."""
        await self._learning.result()

    def suspect(self) -> None:
        """Ask again in the background, because a node did not answer or redirected a command."""
        self._learning.start()

    @property
    def primaries(self) -> Mapping[Node, Redis]:
        return {node: self.at(node) for node in dict.fromkeys(self._owners)}

    def at(self, node: Node) -> Redis:
        """Return the client of one node."""
        if node not in self._clients:
            self._clients[node] = Redis.from_pool(pool({**self._options, "host": node.host, "port": node.port}))
        return self._clients[node]

    def owner(self, args: Sequence[Any]) -> Node | None:
        """Return the node of a command's key; None for a command without a key."""
        key = _key_of(args)
        if not self._owners:
            raise exceptions.ConnectionError("no node of the cluster has answered yet")
        return None if key is None else self._owners[key_slot(self.get_encoder().encode(key))]

    def moved(self, error: exceptions.MovedError, asked: Node) -> Node:
        """Take a redirection over and return its node. Without a host it means the host that was asked."""
        node = Node(error.host or asked.host, error.port)
        self._owners[error.slot_id] = node
        self.suspect()
        return node

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        if args[0] in _EVERYWHERE:
            return (await self._ask_all(args, options))[0]
        node = self.owner(args) or self._owners[0]
        try:
            return await self._ask(node, args, options)
        except exceptions.MovedError as error:
            return await self._ask(self.moved(error, node), args, options)
        except exceptions.AskError as error:
            return await self._ask_importing(Node(error.host or node.host, error.port), args, options)

    async def _ask_all(self, args: Sequence[Any], options: Mapping[str, Any]) -> list[Any]:
        return [await self._ask(node, args, options) for node in self.primaries]

    async def _ask(self, node: Node, args: Sequence[Any], options: Mapping[str, Any]) -> Any:
        with self.calling(node):
            return await self.at(node).execute_command(*args, **options)  # type: ignore[no-untyped-call]

    async def _ask_importing(self, node: Node, args: Sequence[Any], options: Mapping[str, Any]) -> Any:
        """Ask the node to which a slot is being moved: ``ASKING`` and the command go over one connection."""
        pipe = self.at(node).pipeline(transaction=False)
        pipe.execute_command("ASKING")
        pipe.execute_command(*args, **options)
        with self.calling(node):
            return (await pipe.execute())[1]

    @contextmanager
    def calling(self, node: Node) -> Iterator[None]:
        """Around one call of a node: if it does not answer, the nodes are asked again who has its slots."""
        has_answered = False
        try:
            with waiting_for(str(node)):
                yield
            has_answered = True
        except exceptions.ResponseError:
            has_answered = True
            raise
        finally:
            if not has_answered:
                self.suspect()

    def pipeline(self, transaction: bool = True, shard_hint: str | None = None) -> "Pipeline":
        """``transaction`` needs all keys in one slot."""
        return _ClusterPipeline(self, transaction)

    def register_script(self, script: Any) -> Any:
        return _Script(self, script)

    def get_encoder(self) -> Any:
        return self.connection_pool.get_encoder()  # type: ignore[no-untyped-call]

    async def aclose(self, close_connection_pool: bool | None = None) -> None:
        self._learning.cancel()
        for client in self._clients.values():
            await client.aclose()

    async def _learn(self) -> None:
        known = dict.fromkeys([*self._owners, *self._seeds, *self._clients])
        views, problem = await first_answers(self._view(node) for node in known)
        if not views:
            raise exceptions.ConnectionError(f"no node of the cluster answers{problem}")
        best = max(views, key=lambda view: (view.is_ok, view.epoch))
        owners = [self._seeds[0]] * SLOTS
        for first, last, node in best.ranges:
            owners[first : last + 1] = [node] * (last + 1 - first)
        self._owners = owners

    async def _view(self, node: Node) -> _View:
        pipe = self.at(node).pipeline(transaction=False)
        pipe.execute_command("CLUSTER INFO")
        pipe.execute_command("CLUSTER", "SLOTS")
        info, slots = await pipe.execute()
        state = info if isinstance(info, dict) else dict(line.split(":", 1) for line in info.splitlines() if line)
        return _View(state["cluster_state"] == "ok", int(state["cluster_current_epoch"]), tuple(_ranges(slots, node)))


class _Script(AsyncScript):
    """A script that is sent to a node in full when that node does not have it."""

    async def __call__(self, keys: Any = None, args: Any = None, client: Any = None) -> Any:
        words = (len(keys), *keys, *(args or ()))
        try:
            return await self.registered_client.execute_command("EVALSHA", self.sha, *words)
        except exceptions.NoScriptError:
            return await self.registered_client.execute_command("EVAL", self.script, *words)


class _ClusterPipeline(Pipeline):
    """Commands for several nodes: one round trip for each node, all of them at once."""

    def __init__(self, cluster: Cluster, transaction: bool) -> None:
        super().__init__(cluster.connection_pool, cluster.response_callbacks, transaction, None)
        self._cluster = cluster

    async def execute(self, raise_on_error: bool = True) -> list[Any]:
        stack, self.command_stack = self.command_stack, []
        parts: dict[Node, list[int]] = {}
        node: Node | None = None
        for number, (args, _) in enumerate(stack):
            node = self._cluster.owner(args) or node  # a command without a key belongs to the one before it
            assert node is not None, "a pipeline begins with a key"
            parts.setdefault(node, []).append(number)
        assert len(parts) <= 1 or not self.is_transaction, "a transaction's keys lie in one slot"
        replies: list[Any] = [None] * len(stack)
        found = await asyncio.gather(
            *(self._part(node, [stack[number] for number in numbers]) for node, numbers in parts.items()),
            return_exceptions=True,
        )
        for numbers, part in zip(parts.values(), found, strict=True):
            if isinstance(part, BaseException):
                raise part
            for number, reply in zip(numbers, part, strict=True):
                replies[number] = reply
        if raise_on_error and (error := next((r for r in replies if isinstance(r, Exception)), None)):
            raise error
        return replies

    async def _part(self, node: Node, stack: list[Any]) -> list[Any]:
        try:
            replies = await self._send(node, stack)
        except exceptions.MovedError as error:
            return await self._send(self._cluster.moved(error, node), stack)
        for number, reply in enumerate(replies):
            if isinstance(reply, exceptions.MovedError | exceptions.AskError):
                args, options = stack[number]
                replies[number] = await self._cluster.execute_command(*args, **options)
        return replies

    async def _send(self, node: Node, stack: list[Any]) -> list[Any]:
        pipe = self._cluster.at(node).pipeline(transaction=self.is_transaction)
        pipe.command_stack = stack
        with self._cluster.calling(node):
            return await pipe.execute(raise_on_error=False)


def _key_of(args: Sequence[Any]) -> Any:
    if args[0] in _SCRIPTS:
        assert int(args[2]) > 0, "a script names its keys"
        return args[3]
    return None if args[0] in _KEYLESS or len(args) < 2 else args[1]


def _ranges(slots: Sequence[Any], asked: Node) -> Iterator[tuple[int, int, Node]]:
    for first, last, (host, port, *_), *_ in slots:
        yield int(first), int(last), Node(str(host or asked.host), int(port or DEFAULT_PORT))
