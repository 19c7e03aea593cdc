"""Reads the catalog from a ``user_config``: an entry that is not valid is rejected with a reason, the others are used.

Nothing here raises on bad input: a ``reconfigure`` that raises would end its replica.
"""

from collections.abc import Iterator, Mapping
from typing import TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

from billing.catalog.abuse import Abuse
from billing.catalog.catalog import Catalog, Model, RejectedEntry
from billing.catalog.plans import Pack, Plan, PlanKind
from billing.pricing.costs import Costs
from billing.pricing.modifiers import Pricing
from billing.usage import Name
from deployments.config import GatewayUserConfig, ModelEntry
from deployments.gateway.errors import NotConfigured

NO_PLANS = {"prepaid": Plan(kind=PlanKind.PREPAID)}
"""Used where no configured plan is valid: it gives no credit."""

_NAME = TypeAdapter(Name)
T = TypeVar("T", bound=BaseModel)


class CatalogHolder:
    """The catalog in force in this process."""

    def __init__(self) -> None:
        self._catalog: Catalog | None = None
        self._plans: dict[str, Plan] = {}
        """Every plan that was in force, as it last was."""

    @property
    def has_catalog(self) -> bool:
        return self._catalog is not None

    @property
    def current(self) -> Catalog:
        """The catalog in force. Raises NotConfigured before the first one."""
        if self._catalog is None:
            raise NotConfigured
        return self._catalog

    def put(self, raw: object) -> Catalog:
        """Read a catalog and put it in force. A rejected entry leaves the last good version of itself in force.

        A plan that is no longer there stays with the tenants who are on it.
        """
        found = read_catalog(raw, self._catalog)
        self._plans |= found.plans
        self._catalog = found.remembering(self._plans)
        return self._catalog

    def remember(self, plans: Mapping[str, Plan]) -> None:
        """Add plans that were in force before this process started."""
        self._plans |= plans
        if self._catalog is not None:
            self._catalog = self._catalog.remembering(self._plans)


def read_catalog(raw: object, last_good: Catalog | None = None) -> Catalog:
    """Build a catalog from a ``user_config``. Never raises on bad input.

    A rejected entry stays in force as it is in ``last_good``, if it is there.
    """
    rejected: list[RejectedEntry] = []
    config = raw if isinstance(raw, Mapping) else {}
    if not config:
        rejected.append(
            RejectedEntry(kind="config", id="user_config", reason="must be a mapping, and not an empty one")
        )
    rejected += [
        RejectedEntry(kind="config", id=str(key), reason="unknown key: check its spelling")
        for key in config
        if key not in GatewayUserConfig.model_fields
    ]
    old = last_good or Catalog(models=(), plans=NO_PLANS, default_plan="prepaid")
    if not config:
        return old.model_copy(update={"rejected": tuple(rejected)})
    plans = _named(config.get("plans"), Plan, "plan", old.plans, rejected) or dict(old.plans)
    return Catalog(
        models=tuple(_models(config, old, rejected)),
        plans=plans,
        packs=_named(config.get("packs", {}), Pack, "pack", old.packs, rejected),
        default_plan=_default_plan(config.get("default_plan"), plans, old, rejected),
        pricing=_one(config, "pricing", Pricing, rejected) or old.pricing,
        costs=_one(config, "costs", Costs, rejected) or (old.costs if "costs" in config else None),
        abuse=_one(config, "abuse", Abuse, rejected) or old.abuse,
        rejected=tuple(rejected),
    )


def _models(config: Mapping[object, object], old: Catalog, rejected: list[RejectedEntry]) -> Iterator[Model]:
    taken: set[str] = set()
    last = old.by_id()
    for place, kind, raw in _entries(config, rejected):
        name = _id_of(raw, place)
        model, reason = _read_model(kind, raw, name in taken)
        if reason:
            rejected.append(RejectedEntry(kind=kind, id=name, reason=reason))
        if model is None and name not in taken:
            model = last.get(name) or (_base_of(old) if kind == "base" else None)
        if model is not None:
            taken.add(model.id)
            yield model


def _base_of(old: Catalog) -> Model | None:
    return next((model for model in old.models if not model.is_adapter), None)


def _entries(config: Mapping[object, object], rejected: list[RejectedEntry]) -> Iterator[tuple[str, str, object]]:
    yield "base", "base", config.get("base")
    adapters = config.get("adapters", [])
    if not isinstance(adapters, list | tuple):
        rejected.append(RejectedEntry(kind="config", id="adapters", reason="must be a list"))
        return
    for number, raw in enumerate(adapters):
        yield f"adapters[{number}]", "adapter", raw


def _id_of(raw: object, place: str) -> str:
    name = raw.get("id") if isinstance(raw, Mapping) else None
    return name if isinstance(name, str) and name else place


def _read_model(kind: str, raw: object, is_taken: bool) -> tuple[Model | None, str]:
    """One entry's model, or the reason why it is rejected."""
    if raw is None:
        return None, "missing"
    if is_taken:
        return None, "an earlier entry has this id: ids must differ"
    try:
        entry = ModelEntry.model_validate(_with_tuples(raw))
        if kind == "adapter" and not entry.path:
            return None, "`path` is missing"
        if kind == "adapter" and not _is_digest(entry.digest):
            return None, "`digest` is not a SHA-256 in hex: apply the file with `farebox deploy`, which writes it"
        if kind == "base" and entry.path:
            return None, "the base model's path is set in `args.model`: remove `path`"
        return entry.to_model(), ""
    except ValidationError as error:
        return None, explain(error)


def _with_tuples(raw: object) -> object:
    """The entry with its list of tenants as a tuple, which YAML does not have."""
    if isinstance(raw, Mapping) and isinstance(raw.get("visibility"), list):
        return {**raw, "visibility": tuple(raw["visibility"])}
    return raw


def _is_digest(text: str) -> bool:
    return len(text) == 64 and not set(text) - set("0123456789abcdef")


def _named(raw: object, shape: type[T], kind: str, old: Mapping[str, T], rejected: list[RejectedEntry]) -> dict[str, T]:
    if not isinstance(raw, Mapping):
        rejected.append(RejectedEntry(kind="config", id=f"{kind}s", reason="must be a mapping of names"))
        return dict(old)
    good: dict[str, T] = {}
    for name, value in raw.items():
        try:
            good[_NAME.validate_python(name)] = shape.model_validate(value)
        except ValidationError as error:
            rejected.append(RejectedEntry(kind=kind, id=str(name), reason=explain(error)))
            if name in old:
                good[str(name)] = old[str(name)]
    return good


def _one(config: Mapping[object, object], name: str, shape: type[T], rejected: list[RejectedEntry]) -> T | None:
    """The value of ``name``, or its defaults where it is left out; ``None`` where it is not valid."""
    try:
        return shape.model_validate(config.get(name, {}))
    except ValidationError as error:
        if name in config:
            rejected.append(RejectedEntry(kind="config", id=name, reason=explain(error)))
        return None


def _default_plan(raw: object, plans: Mapping[str, Plan], old: Catalog, rejected: list[RejectedEntry]) -> str:
    if isinstance(raw, str) and raw in plans:
        return raw
    rejected.append(RejectedEntry(kind="config", id="default_plan", reason=f"{raw!r} is not one of the plans"))
    return old.default_plan if old.default_plan in plans else min(plans)


def explain(error: ValidationError) -> str:
    """The errors in one line, each with its place, and without the input."""
    parts = []
    for detail in error.errors(include_url=False, include_input=False, include_context=False):
        where = ".".join(str(step) for step in detail["loc"])
        message = detail["msg"].removeprefix("Value error, ")
        parts.append(f"{where}: {message}" if where else message)
    return "; ".join(parts)
