"""FastAPI runs the dependencies of routes on the event loop."""

import inspect
from collections.abc import Callable, Iterator

import pytest
from fastapi import APIRouter
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute

from deployments.gateway.api import account, admin, openai, webhook


def dependencies_of(dependant: Dependant) -> Iterator[Callable[..., object]]:
    for needed in dependant.dependencies:
        assert needed.call is not None
        yield needed.call
        yield from dependencies_of(needed)


def is_run_on_the_loop(call: Callable[..., object]) -> bool:
    return inspect.iscoroutinefunction(call) or inspect.iscoroutinefunction(getattr(call, "__call__", None))  # noqa: B004


@pytest.mark.parametrize("router", [account.router, admin.router, openai.router, webhook.router])
def test_dependencies_run_on_event_loop(router: APIRouter) -> None:
    calls = [call for r in router.routes if isinstance(r, APIRoute) for call in dependencies_of(r.dependant)]
    assert calls
    assert [call for call in calls if not is_run_on_the_loop(call)] == []
