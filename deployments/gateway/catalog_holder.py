"""From what the owner wrote to what is for sale: each entry judged alone, the bad ones set aside with a reason.

Knows the shape of a ``user_config``; opens no adapter, and never raises on bad input: a
``reconfigure`` that raised would end its replica.
"""

import json
from collections.abc import Iterator, Mapping
from typing import TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

from billing.catalog.abuse import Abuse
from billing.catalog.catalog import Catalog, Model, RejectedEntry
from billing.catalog.plans import Pack, Plan, PlanKind
from billing.errors import BillingError
from billing.pricing.costs import Costs
from billing.pricing.modifiers import Pricing
from billing.usage import Name
from deployments.config import GatewayUserConfig, ModelEntry

NO_PLANS = {"prepaid": Plan(kind=PlanKind.PREPAID)}
"""Stands in where no configured plan is valid: it gives nobody credit."""

_NAME = TypeAdapter(Name)
T = TypeVar("T", bound=BaseModel)


class NotConfigured(BillingError):
    """No catalog has reached this process yet."""

    def __str__(self) -> str:
        return "nothing is for sale yet: this gateway waits for its configuration"


class CatalogHolder:
    """The catalog in force in this process, swapped whole."""

    def __init__(self) -> None:
        self._catalog: Catalog | None = None
        self._plans: dict[str, Plan] = {}
        """Every plan that was in force, as it last was."""

    @property
    def is_stocked(self) -> bool:
        return self._catalog is not None

    @property
    def current(self) -> Catalog:
        """Raises NotConfigured before the first one came."""
        if self._catalog is None:
            raise NotConfigured
        return self._catalog

    def put(self, raw: object) -> Catalog:
        """Read and swap; what is bad leaves the last good version of the same entry in force.

        A plan that is gone stays with the tenants who are on it.
        """
        found = read_catalog(raw, self._catalog)
        self._plans |= found.plans
        self._catalog = found.remembering(self._plans)
        return self._catalog

    def remember(self, plans: Mapping[str, Plan]) -> None:
        """Plans that were in force before this process, or that it never saw."""
        self._plans |= plans
        if self._catalog is not None:
            self._catalog = self._catalog.remembering(self._plans)


def read_catalog(raw: object, last_good: Catalog | None = None) -> Catalog:
    """Build a catalog from a ``user_config``, each entry judged alone; never raises on bad input.

    An entry that does not validate is quarantined with its reason; where ``last_good`` still has
    that entry, the old version stays in force.
    """
    aside: list[RejectedEntry] = []
    config = raw if isinstance(raw, Mapping) else {}
    if not config:
        aside.append(RejectedEntry(kind="config", id="user_config", reason="must be a mapping, and not an empty one"))
    aside += [
        RejectedEntry(kind="config", id=str(key), reason="unknown key: check its spelling")
        for key in config
        if key not in GatewayUserConfig.model_fields
    ]
    old = last_good or Catalog(models=(), plans=NO_PLANS, default_plan="prepaid")
    if not config:
        return _with_rejected(old, aside)
    plans = _named(config.get("plans"), Plan, "plan", old.plans, aside) or dict(old.plans)
    return Catalog(
        models=tuple(_models(config, old, aside)),
        plans=plans,
        packs=_named(config.get("packs", {}), Pack, "pack", old.packs, aside),
        default_plan=_default_plan(config.get("default_plan"), plans, old, aside),
        pricing=_one(config, "pricing", Pricing, aside) or old.pricing,
        costs=_one(config, "costs", Costs, aside) or (old.costs if "costs" in config else None),
        abuse=_one(config, "abuse", Abuse, aside) or old.abuse,
        rejected=tuple(aside),
    )


def _with_rejected(catalog: Catalog, aside: list[RejectedEntry]) -> Catalog:
    return catalog.model_copy(update={"rejected": tuple(aside)})


def _models(config: Mapping[object, object], old: Catalog, aside: list[RejectedEntry]) -> Iterator[Model]:
    taken: set[str] = set()
    last = old.by_id()
    for place, kind, raw in _entries(config, aside):
        name = _id_of(raw, place)
        model, reason = _judge(kind, raw, name in taken)
        if reason:
            aside.append(RejectedEntry(kind=kind, id=name, reason=reason))
        if model is None and name not in taken:
            model = last.get(name) or (_base_of(old) if kind == "base" else None)
        if model is not None:
            taken.add(model.id)
            yield model


def _base_of(old: Catalog) -> Model | None:
    return next((model for model in old.models if not model.is_adapter), None)


def _entries(config: Mapping[object, object], aside: list[RejectedEntry]) -> Iterator[tuple[str, str, object]]:
    yield "base", "base", config.get("base")
    adapters = config.get("adapters", [])
    if not isinstance(adapters, list | tuple):
        aside.append(RejectedEntry(kind="config", id="adapters", reason="must be a list"))
        return
    for number, raw in enumerate(adapters):
        yield f"adapters[{number}]", "adapter", raw


def _id_of(raw: object, place: str) -> str:
    name = raw.get("id") if isinstance(raw, Mapping) else None
    return name if isinstance(name, str) and name else place


def _judge(kind: str, raw: object, is_taken: bool) -> tuple[Model | None, str]:
    """One entry's model, or the reason why it is not served."""
    if raw is None:
        return None, "missing"
    if is_taken:
        return None, "this id stands on an earlier entry: ids must differ"
    try:
        entry = ModelEntry.model_validate(_as_written(raw))
        if kind == "adapter" and not entry.path:
            return None, "`path` is missing"
        if kind == "adapter" and not _is_digest(entry.digest):
            return None, "`digest` is not a SHA-256 in hex: apply the file with `farebox deploy`, which writes it"
        if kind == "base" and entry.path:
            return None, "the base model's path stands in `args.model`: remove `path`"
        return entry.to_model(), ""
    except ValidationError as error:
        return None, explain(error)


def _as_written(raw: object) -> object:
    """YAML has no tuples; a list of tenants is one."""
    if isinstance(raw, Mapping) and isinstance(raw.get("visibility"), list):
        return {**raw, "visibility": tuple(raw["visibility"])}
    return raw


def _is_digest(text: str) -> bool:
    return len(text) == 64 and not set(text) - set("0123456789abcdef")


def _named(raw: object, shape: type[T], kind: str, old: Mapping[str, T], aside: list[RejectedEntry]) -> dict[str, T]:
    if not isinstance(raw, Mapping):
        aside.append(RejectedEntry(kind="config", id=f"{kind}s", reason="must be a mapping of names"))
        return dict(old)
    good: dict[str, T] = {}
    for name, value in raw.items():
        try:
            good[_NAME.validate_python(name)] = shape.model_validate(value)
        except ValidationError as error:
            aside.append(RejectedEntry(kind=kind, id=str(name), reason=explain(error)))
            if name in old:
                good[str(name)] = old[str(name)]
    return good


def _one(config: Mapping[object, object], name: str, shape: type[T], aside: list[RejectedEntry]) -> T | None:
    """What stands under ``name``, its defaults where nothing does; nothing where it is bad or has none."""
    try:
        return shape.model_validate(config.get(name, {}))
    except ValidationError as error:
        if name in config:
            aside.append(RejectedEntry(kind="config", id=name, reason=explain(error)))
        return None


def _default_plan(raw: object, plans: Mapping[str, Plan], old: Catalog, aside: list[RejectedEntry]) -> str:
    if isinstance(raw, str) and raw in plans:
        return raw
    aside.append(RejectedEntry(kind="config", id="default_plan", reason=f"{raw!r} is not one of the plans"))
    return old.default_plan if old.default_plan in plans else min(plans)


def explain(error: ValidationError) -> str:
    """One line for people: where, and what is wrong, without the input's content."""
    parts = []
    for detail in error.errors(include_url=False, include_input=False, include_context=False):
        where = ".".join(str(step) for step in detail["loc"])
        message = detail["msg"].removeprefix("Value error, ")
        parts.append(f"{where}: {message}" if where else message)
    return "; ".join(parts)


def as_json(catalog: Catalog) -> dict[str, object]:
    """The catalog as plain JSON values, with its hash, each model's price version and the plans that are no more."""
    plain: dict[str, object] = json.loads(catalog.model_dump_json())
    versions = {model.id: model.price.version for model in catalog.models}
    retired = sorted(catalog.retired)
    plain["quarantined"] = plain["rejected"]
    return plain | {"hash": catalog.content_hash, "price_versions": versions, "retired_plans": retired}
