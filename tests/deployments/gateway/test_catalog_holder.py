"""Reading a catalog: rejected entries, and what stays in force."""

import copy
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from billing.catalog.catalog import Catalog
from deployments.gateway.catalog_holder import CatalogHolder, read_catalog
from deployments.gateway.errors import NotConfigured
from tests.support.gateway import DIGEST, USER_CONFIG


def config(change: Callable[[dict[str, object]], None] = lambda _: None) -> dict[str, object]:
    made = copy.deepcopy(USER_CONFIG)
    made["adapters"] = made["adapters"][:2]  # type: ignore[index]
    change(made)
    return made


def aside(catalog: Catalog) -> dict[str, str]:
    return {entry.id: entry.reason for entry in catalog.rejected}


def ids(catalog: Catalog) -> list[str]:
    return [model.id for model in catalog.models]


def adapter(raw: dict[str, object], number: int = 0) -> dict[str, object]:
    entry: dict[str, object] = raw["adapters"][number]  # type: ignore[index]
    return entry


def test_valid_configuration_is_read_whole() -> None:
    catalog = read_catalog(config())
    assert ids(catalog) == ["farebox-base", "pirate", "acme/private:1"]
    assert catalog.rejected == ()
    assert catalog.by_id()["acme/private:1"].tenants == ("acme",)
    assert catalog.by_id()["pirate"].tenants is None


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda raw: adapter(raw).pop("price"), "price"),
        (lambda raw: adapter(raw).update(price={}), "no rate"),
        (lambda raw: adapter(raw).update(price={"output_per_1m": 1.5}), "decimal string"),
        (lambda raw: adapter(raw).update(price={"output_per_1m": "-1"}), "greater than or equal"),
        (lambda raw: adapter(raw).update(price={"free": True, "per_request": "1"}), "free adapter"),
        (lambda raw: adapter(raw).pop("path"), "path"),
        (lambda raw: adapter(raw).pop("digest"), "farebox deploy"),
        (lambda raw: adapter(raw).update(digest="xyz"), "SHA-256"),
        (lambda raw: adapter(raw).update(pirce="1"), "pirce"),
        (lambda raw: adapter(raw).update(visibility="privat"), "visibility"),
    ],
)
def test_bad_entry_rejected_with_reason(change: Callable[[dict[str, object]], None], word: str) -> None:
    catalog = read_catalog(config(change))
    assert ids(catalog) == ["farebox-base", "acme/private:1"]
    assert word in aside(catalog)["pirate"]


def test_rejected_entry_keeps_last_good_version() -> None:
    good = read_catalog(config())
    kept = read_catalog(config(lambda raw: adapter(raw).update(price={})), good)
    assert kept.by_id()["pirate"] == good.by_id()["pirate"]
    assert "pirate" in aside(kept)
    kept = read_catalog(config(lambda raw: raw["plans"].update(prepaid={"kind": "x"})), good)  # type: ignore[attr-defined]
    assert kept.plans["prepaid"] == good.plans["prepaid"]
    assert "prepaid" in aside(kept)


def test_removed_entry_is_no_longer_sold() -> None:
    good = read_catalog(config())
    fewer = read_catalog(config(lambda raw: raw.update(adapters=[], packs={})), good)
    assert ids(fewer) == ["farebox-base"]
    assert fewer.packs == {}


def test_duplicate_id_rejected() -> None:
    catalog = read_catalog(config(lambda raw: adapter(raw, 1).update(id="pirate")))
    assert ids(catalog) == ["farebox-base", "pirate"]
    assert "earlier entry" in aside(catalog)["pirate"]
    assert catalog.by_id()["pirate"].tenants is None


def test_unknown_key_rejected() -> None:
    catalog = read_catalog(config(lambda raw: raw.update(adaptors=[])))
    assert "spelling" in aside(catalog)["adaptors"]
    assert len(ids(catalog)) == 3


def test_default_plan_must_exist() -> None:
    catalog = read_catalog(config(lambda raw: raw.update(default_plan="gold")))
    assert catalog.default_plan in catalog.plans
    assert "default_plan" in aside(catalog)


@pytest.mark.parametrize("raw", [None, [], "x", 5, {}, {"base": None}, {"plans": []}, {"adapters": {"a": 1}}])
def test_nonsense_keeps_last_good_catalog(raw: object) -> None:
    good = read_catalog(config())
    kept = read_catalog(raw, good)
    assert kept.plans == good.plans
    assert kept.rejected
    assert "farebox-base" in ids(kept)
    assert isinstance(read_catalog(raw), Catalog)


junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["id", "price", "path", "base", "adapters", "plans", "packs", "kind", "default_plan", "x"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=20,
)


@given(junk)
def test_read_catalog_never_raises(raw: object) -> None:
    good = read_catalog(config())
    assert isinstance(read_catalog(raw), Catalog)
    assert isinstance(read_catalog(raw, good), Catalog)


def test_equal_configurations_have_equal_hashes() -> None:
    assert read_catalog(config()).content_hash == read_catalog(config()).content_hash
    changed = read_catalog(config(lambda raw: adapter(raw).update(digest="cd" * 32)))
    assert changed.content_hash != read_catalog(config()).content_hash


def test_holder_without_catalog_raises() -> None:
    catalog_holder = CatalogHolder()
    assert not catalog_holder.has_catalog
    with pytest.raises(NotConfigured):
        _ = catalog_holder.current
    catalog_holder.put(config())
    assert catalog_holder.has_catalog
    assert catalog_holder.current.by_id()["pirate"].digest == DIGEST
