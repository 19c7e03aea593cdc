"""The demo's customers, made over the API as an operator and a buyer would: one for each plan, and one with nothing.

Knows HTTP routes; touches no store. Doing it again changes nothing.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import httpx

TIMEOUT_S = 60.0
"""For Dodo's customer to be made, and for a payment's webhook to arrive."""
KEY_NAME = "demo"
_POLL_S = 0.1
_CALL_TIMEOUT_S = 30.0

E = TypeVar("E", bound=Exception)


class SeedFailed(Exception):
    """A demo tenant could not be made; the message says at which step."""


@dataclass(frozen=True, slots=True)
class Planned:
    """A tenant of the demo, and what it buys at its start."""

    name: str
    plan: str
    pack: str = ""
    subscribes: bool = False


PLANNED = (
    Planned("free", "free"),
    Planned("prepaid", "prepaid", pack="small"),
    Planned("payg", "payg", subscribes=True),
    Planned("pro", "pro", subscribes=True),
    Planned("empty", "prepaid"),
)


@dataclass(frozen=True, slots=True)
class DemoTenant:
    """A tenant as the demo's user needs it."""

    api_key: str
    plan: str
    dodo_customer_id: str


async def seed(
    api_url: str, admin_key: str, sandbox_url: str, known_keys: Mapping[str, str] | None = None
) -> dict[str, DemoTenant]:
    """Make the demo's tenants and let them buy what they need to call.

    ``known_keys`` are API keys of an earlier time, by tenant; those that still work are kept.

    Raises:
        SeedFailed: a step was refused, or its effect did not come in time.
    """
    async with (
        httpx.AsyncClient(
            base_url=api_url, headers={"Authorization": f"Bearer {admin_key}"}, timeout=_CALL_TIMEOUT_S
        ) as admin,
        httpx.AsyncClient(base_url=sandbox_url, timeout=_CALL_TIMEOUT_S) as sandbox,
    ):
        try:
            async with asyncio.TaskGroup() as group:
                tasks = {
                    planned.name: group.create_task(
                        _seed_one(planned, admin, sandbox, (known_keys or {}).get(planned.name, ""))
                    )
                    for planned in PLANNED
                }
        except* httpx.HTTPError as errors:
            error = _first(errors)
            raise SeedFailed(f"{error.request.url} does not answer: {error or type(error).__name__}") from error
        except* SeedFailed as errors:
            raise _first(errors) from None
    return {name: task.result() for name, task in tasks.items()}


def _first(errors: BaseExceptionGroup[E]) -> E:
    """What failed first: the rest was ended because of it."""
    first = errors.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first


async def _seed_one(
    planned: Planned, admin: httpx.AsyncClient, sandbox: httpx.AsyncClient, known_key: str
) -> DemoTenant:
    path = f"/admin/tenants/{planned.name}"
    order = {"id": planned.name, "email": f"{planned.name}@example.com", "plan": planned.plan, "name": planned.name}
    if planned.name not in {tenant["id"] for tenant in _list(await _ask(admin, "GET", "/admin/tenants"))}:
        await _ask(admin, "POST", "/admin/tenants", order)
    key = await _key(admin, path, known_key)
    customer = await _eventually(f"Dodo's customer of {planned.name}", lambda: _customer(admin, path))
    async with httpx.AsyncClient(
        base_url=admin.base_url, headers={"Authorization": f"Bearer {key}"}, timeout=_CALL_TIMEOUT_S
    ) as caller:
        await _buy(planned, caller, sandbox)
    return DemoTenant(key, planned.plan, customer)


async def _key(admin: httpx.AsyncClient, path: str, known: str) -> str:
    """The key of an earlier time if it still works, else a new one in place of those before it."""
    if known and await _works(admin, known):
        return known
    for key in _list(await _ask(admin, "GET", f"{path}/keys")):
        if key["name"] == KEY_NAME and key["revoked_at_ms"] is None:
            await _ask(admin, "DELETE", f"{path}/keys/{key['id']}")
    return str((await _ask(admin, "POST", f"{path}/keys", {"name": KEY_NAME}))["api_key"])


async def _works(client: httpx.AsyncClient, key: str) -> bool:
    reply = await _patiently(
        client.build_request("GET", "/v1/account", headers={"Authorization": f"Bearer {key}"}), client
    )
    return reply.is_success


async def _customer(admin: httpx.AsyncClient, path: str) -> str:
    return str((await _ask(admin, "GET", path))["dodo_customer_id"])


async def _buy(planned: Planned, caller: httpx.AsyncClient, sandbox: httpx.AsyncClient) -> None:
    """Buy the pack or subscription, unless it was bought before; returns when its credit is there."""
    if not (planned.pack or planned.subscribes) or await _has_bought(planned, caller):
        return
    order = {"plan": planned.plan} if planned.subscribes else {"pack": planned.pack}
    session = (await _ask(caller, "POST", "/v1/checkout", order))["session_id"]
    await _ask(sandbox, "POST", f"/_sandbox/pay/{session}")
    await _eventually(f"the credit that {planned.name} bought", lambda: _has_bought(planned, caller))


async def _has_bought(planned: Planned, caller: httpx.AsyncClient) -> bool:
    """A subscription stays on the account; a pack is there, or was used up by recorded requests."""
    account = await _ask(caller, "GET", "/v1/account")
    if planned.subscribes:
        return account["subscription"] is not None
    return bool(account["packs"] or _list(await _ask(caller, "GET", "/v1/usage/records?limit=1")))


async def _ask(
    client: httpx.AsyncClient, method: str, path: str, body: Mapping[str, str] | None = None
) -> dict[str, object]:
    reply = await _patiently(client.build_request(method, path, json=body), client)
    if not reply.is_success:
        raise SeedFailed(
            f"{method} {reply.request.url} answered {reply.status_code}: {reply.text[:300]}; `farebox logs` shows why"
        )
    answer: dict[str, object] = reply.json()
    return answer


async def _patiently(request: httpx.Request, client: httpx.AsyncClient) -> httpx.Response:
    """Send it, again while the answer is 503: something is still being made ready, or the machine is busy."""
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        reply = await client.send(request)
        if reply.status_code != httpx.codes.SERVICE_UNAVAILABLE or time.monotonic() > deadline:
            return reply
        await asyncio.sleep(_POLL_S)


async def _eventually(what: str, ask: Callable[[], Awaitable[str | bool]]) -> str:
    deadline = time.monotonic() + TIMEOUT_S
    while not (found := await ask()):
        if time.monotonic() > deadline:
            raise SeedFailed(f"{what} did not come within {TIMEOUT_S:g} s: see `farebox status`")
        await asyncio.sleep(_POLL_S)
    return str(found)


def _list(answer: dict[str, object]) -> list[dict[str, object]]:
    listed = answer["data"]
    assert isinstance(listed, list), "the API lists under `data`"
    return listed
