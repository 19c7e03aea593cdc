"""The adapter registry: pins, evictions and remembered failures."""

from deployments.inference.native.registry import FAILURE_TTL_S, MAX_FAILURES, AdapterRegistry
from deployments.inference.request import AdapterRef


def test_pinned_adapters_stay_with_one_slot_for_others() -> None:
    registry = AdapterRegistry(2)
    refs = {name: AdapterRef(name, name, "") for name in "abc"}
    registry.pin(["a", "b", "c"])
    for name in "abcbc":
        registry.acquire(refs[name], ())
        registry.take_loads()
        registry.mark_loaded(name)
        assert registry.acquire(refs[name], ()) is not None
        registry.release(name)
    assert {resident.ref.name for resident in registry.loaded} == {"a", "c"}


def test_failure_is_remembered_for_its_ttl() -> None:
    registry = AdapterRegistry(1)
    ref = AdapterRef("a", "a", "")
    registry.prefetch(ref, ())
    registry.mark_failed("a", "no good", now=0.0)
    assert registry.failure("a", now=1.0) == "no good"
    assert registry.failure("a", now=FAILURE_TTL_S) is None
    assert registry.has_free_slot
    for i in range(2 * MAX_FAILURES):
        registry.prefetch(AdapterRef(str(i), str(i), ""), ())
        registry.mark_failed(str(i), "no good", now=0.0)
    assert len(registry._failures) <= MAX_FAILURES
