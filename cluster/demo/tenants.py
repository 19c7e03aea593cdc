"""Creates the demo's tenants over the API: one on each plan, and one without credit. A second call changes nothing."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import httpx

from billing.tenants.tenant import BUYER_SCOPES
from cluster.errors import ClusterError

TIMEOUT_S = 60.0
"""For Dodo to create a customer, and for the webhook of a payment to arrive."""
KEY_NAME = "demo"
KEY_SCOPES = [scope.value for scope in BUYER_SCOPES]
"""Each has one key, with which it also buys."""
_POLL_S = 0.1
_CALL_TIMEOUT_S = 30.0

E = TypeVar("E", bound=Exception)


class DemoTenantError(ClusterError):
    """A demo tenant could not be created."""


@dataclass(frozen=True, slots=True)
class Planned:
    """A tenant to create, and what it buys."""

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
    """A created tenant."""

    api_key: str
    plan: str
    dodo_customer_id: str


async def create_tenants(
    api_url: str, admin_key: str, sandbox_url: str, earlier_keys: Mapping[str, str] | None = None
) -> dict[str, DemoTenant]:
    """Create the tenants, and buy for each the pack or subscription that it needs.

    ``earlier_keys`` are API keys of an earlier run by tenant; those that still work are kept.

    Raises:
        DemoTenantError: a request was refused, or its effect did not happen in time.
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
                        _create(planned, admin, sandbox, (earlier_keys or {}).get(planned.name, ""))
                    )
                    for planned in PLANNED
                }
        except* httpx.HTTPError as errors:
            error = _first(errors)
            raise DemoTenantError(f"{error.request.url} does not answer: {error or type(error).__name__}") from error
        except* DemoTenantError as errors:
            raise _first(errors) from None
    return {name: task.result() for name, task in tasks.items()}


def _first(errors: BaseExceptionGroup[E]) -> E:
    """The first failure: the other tasks were cancelled because of it."""
    first = errors.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first


async def _create(
    planned: Planned, admin: httpx.AsyncClient, sandbox: httpx.AsyncClient, earlier_key: str
) -> DemoTenant:
    path = f"/admin/tenants/{planned.name}"
    body = {"id": planned.name, "email": f"{planned.name}@example.com", "plan": planned.plan, "name": planned.name}
    if planned.name not in {tenant["id"] for tenant in _list(await _request(admin, "GET", "/admin/tenants"))}:
        await _request(admin, "POST", "/admin/tenants", body)
    key = await _key(admin, path, earlier_key)
    customer = await _eventually(f"Dodo's customer of {planned.name}", lambda: _customer(admin, path))
    async with httpx.AsyncClient(
        base_url=admin.base_url, headers={"Authorization": f"Bearer {key}"}, timeout=_CALL_TIMEOUT_S
    ) as caller:
        await _buy(planned, caller, sandbox)
    return DemoTenant(key, planned.plan, customer)


async def _key(admin: httpx.AsyncClient, path: str, earlier: str) -> str:
    """The earlier key if it still works; else revoke the demo's other keys and create a new one."""
    if earlier and await _works(admin, earlier):
        return earlier
    for key in _list(await _request(admin, "GET", f"{path}/keys")):
        if key["name"] == KEY_NAME and key["revoked_at_ms"] is None:
            await _request(admin, "DELETE", f"{path}/keys/{key['id']}")
    made = await _request(admin, "POST", f"{path}/keys", {"name": KEY_NAME, "scopes": KEY_SCOPES})
    return str(made["api_key"])


async def _works(client: httpx.AsyncClient, key: str) -> bool:
    reply = await _send(client.build_request("GET", "/v1/account", headers={"Authorization": f"Bearer {key}"}), client)
    return reply.is_success


async def _customer(admin: httpx.AsyncClient, path: str) -> str:
    return str((await _request(admin, "GET", path))["dodo_customer_id"])


async def _buy(planned: Planned, caller: httpx.AsyncClient, sandbox: httpx.AsyncClient) -> None:
    """Buy the pack or subscription unless the tenant has it, and wait for its credit."""
    if not (planned.pack or planned.subscribes) or await _has_bought(planned, caller):
        return
    body = {"plan": planned.plan} if planned.subscribes else {"pack": planned.pack}
    session = (await _request(caller, "POST", "/v1/checkout", body))["session_id"]
    await _request(sandbox, "POST", f"/_sandbox/pay/{session}")
    await _eventually(f"the credit that {planned.name} bought", lambda: _has_bought(planned, caller))


async def _has_bought(planned: Planned, caller: httpx.AsyncClient) -> bool:
    """Whether the account has its subscription; or a pack, or usage records, if the pack is used up."""
    account = await _request(caller, "GET", "/v1/account")
    if planned.subscribes:
        return account["subscription"] is not None
    return bool(account["packs"] or _list(await _request(caller, "GET", "/v1/usage/records?limit=1")))


async def _request(
    client: httpx.AsyncClient, method: str, path: str, body: Mapping[str, object] | None = None
) -> dict[str, object]:
    reply = await _send(client.build_request(method, path, json=body), client)
    if not reply.is_success:
        raise DemoTenantError(
            f"{method} {reply.request.url} answered {reply.status_code}: {reply.text[:300]}; `farebox logs` shows why"
        )
    answer: dict[str, object] = reply.json()
    return answer


async def _send(request: httpx.Request, client: httpx.AsyncClient) -> httpx.Response:
    """Send a request, again while the answer is 503, since parts of farebox may still be starting."""
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        reply = await client.send(request)
        if reply.status_code != httpx.codes.SERVICE_UNAVAILABLE or time.monotonic() > deadline:
            return reply
        await asyncio.sleep(_POLL_S)


async def _eventually(what: str, probe: Callable[[], Awaitable[str | bool]]) -> str:
    deadline = time.monotonic() + TIMEOUT_S
    while not (found := await probe()):
        if time.monotonic() > deadline:
            raise DemoTenantError(f"{what} was not there after {TIMEOUT_S:g} s: `farebox status` shows what waits")
        await asyncio.sleep(_POLL_S)
    return str(found)


def _list(answer: dict[str, object]) -> list[dict[str, object]]:
    listed = answer["data"]
    assert isinstance(listed, list), "the API lists under `data`"
    return listed
