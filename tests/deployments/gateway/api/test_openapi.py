"""Every route answers as the OpenAPI document says: with no status and no field that it does not have."""

import asyncio
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import hypothesis
import pytest
import schemathesis
import uvicorn
from schemathesis.checks import CHECKS, load_all_checks

from billing.ledger.account import Grant
from billing.money import MAX_GRANT_NANOS
from billing.store.connection import connect
from billing.tenants.tenant import Scope, Tenant, new_key
from billing.usage import TenantId, Unit
from deployments.config import FareboxArgs
from deployments.gateway.api.application import make_app, make_routes
from deployments.gateway.api.document import document_of
from deployments.gateway.catalog_holder import CatalogHolder
from deployments.gateway.gateway import Gateway
from deployments.gateway.parts import GatewayConfig, build_parts
from deployments.inference.text import Text
from tests.support.gateway import ADMIN_KEY, USER_CONFIG, memory_folder
from tests.support.scripted import ScriptedLink

pytestmark = pytest.mark.slow

EXAMPLES = 20
ENVIRON = {
    "FAREBOX_ADMIN_KEY": ADMIN_KEY,
    "DODO_PAYMENTS_BASE_URL": "http://127.0.0.1:9",
    "DODO_PAYMENTS_API_KEY": "key",
    "DODO_PAYMENTS_WEBHOOK_KEY": "whsec_" + "A" * 32,
}
MODELS = ("pirate", "gratis", "acme/private:1", "unpriced")
TENANTS = ("other", "unknown")
"""Without the tenant whose key is used, since tenants are suspended."""
NEEDS_DODO = ("/v1/checkout", "/v1/portal", "/v1/invoices")
FOREIGN = ("positive_data_acceptance", "negative_data_rejection", "not_a_server_error")
"""Checks that no schema can express (a prompt that does not fit), that we do not make (``"5"`` is accepted for 5), or
that are made below in another way."""


@dataclass(frozen=True, slots=True)
class Desk:
    """A gateway behind a real HTTP server in a thread of its own, and its keys."""

    url: str
    api_key: str
    key_id: str
    """A key that may be revoked."""


class _Server(uvicorn.Server):
    """A server that sets an event when its port is open."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.is_open = threading.Event()

    async def startup(self, sockets: list[object] | None = None) -> None:  # type: ignore[override]
        await super().startup(sockets)  # type: ignore[arg-type]
        self.is_open.set()


@pytest.fixture(scope="module")
def desk(store_url: str, text: Text) -> Iterator[Desk]:
    made: list[object] = []

    async def serve() -> None:
        redis = await connect(store_url)
        await redis.flushall()
        args = FareboxArgs.model_validate(
            {"model": {"id": "farebox-base", "path": "-"}, "engine": {"max_context_tokens": 64}, "max_body_kib": 16}
            | {"spool_dir": str(memory_folder("s"))}
        )
        catalog_holder = CatalogHolder()
        catalog_holder.put(USER_CONFIG)
        parts = build_parts(args, ENVIRON, redis=redis, text=text, link=ScriptedLink(), catalog_holder=catalog_holder)
        for name in ("acme", "other"):
            await parts.tenants.create(Tenant(id=TenantId(name), email=f"{name}@example.com", plan="prepaid"))
        await parts.ledger.grant(Grant("test:1", TenantId("acme"), Unit.NANOS, MAX_GRANT_NANOS))
        secret, key = new_key(TenantId("acme"), 0, scopes=tuple(Scope))
        _, spare = new_key(TenantId("other"), 0)
        for one in (key, spare):
            await parts.tenants.add_key(one)
        app = make_app(Gateway(GatewayConfig.of(args, ENVIRON, "gw"), parts))
        server = _Server(uvicorn.Config(app, port=0, log_level="critical"))
        made.extend((server, secret, spare.id))
        await server.serve()
        await redis.aclose()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    while len(made) < 3:
        thread.join(0.01)
        assert thread.is_alive()
    server, secret, key_id = made
    assert isinstance(server, _Server)
    assert server.is_open.wait(20)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield Desk(f"http://127.0.0.1:{port}", str(secret), str(key_id))
    server.should_exit = True
    thread.join()


schema = schemathesis.openapi.from_dict(dict(document_of(make_routes())))


def _checks() -> list[schemathesis.CheckFunction]:
    load_all_checks()
    return [check for check in CHECKS.get_all() if check.__name__ not in FOREIGN]


def _steer(case: schemathesis.Case, desk: Desk) -> None:
    """Put ids that exist into a part of the requests: random ids never do."""
    for place, name, known in (
        (case.path_parameters, "tenant_id", TENANTS),
        (case.path_parameters, "key_id", (desk.key_id, "key_unknown")),
        (case.path_parameters, "model_id", MODELS),
        (case.body, "model", MODELS),
    ):
        if isinstance(place, dict) and isinstance(place.get(name), str):
            place[name] = known[len(repr(case.body) + place[name]) % len(known)]
    if "Idempotency-Key" in case.headers:
        case.headers["Idempotency-Key"] += str(len(repr(case.body)))


@schema.parametrize()
@hypothesis.settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
def test_routes_answer_as_documented(case: schemathesis.Case, desk: Desk) -> None:
    _steer(case, desk)
    key = ADMIN_KEY if case.path.startswith("/admin") else desk.api_key
    reply = case.call_and_validate(base_url=desk.url, headers={"Authorization": f"Bearer {key}"}, checks=_checks())
    assert reply.status_code < 500 or (case.path in NEEDS_DODO and "payments_unavailable" in reply.text)


@schema.parametrize()
@hypothesis.settings(max_examples=EXAMPLES // 4, deadline=None, derandomize=True)
def test_routes_refused_without_key(case: schemathesis.Case, desk: Desk) -> None:
    reply = case.call_and_validate(base_url=desk.url, checks=_checks())
    is_open = case.path in ("/healthz", "/readyz", "/webhooks/dodo", "/top-up/{link}", "/paid/{link}")
    assert reply.status_code < 500
    assert is_open or reply.status_code in (400, 401, 405, 413)
