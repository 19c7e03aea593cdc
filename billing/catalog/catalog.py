"""Everything that is for sale, as one immutable value with a content hash.

Adapters, their prices, plans and packs change together or not at all. It is built from the configuration once paths
and digests are resolved.
"""

import hashlib
from collections.abc import Mapping
from typing import Annotated, Self

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, model_validator

from billing.catalog.abuse import Abuse
from billing.catalog.errors import ModelNotAllowed, UnknownModel
from billing.catalog.plans import Pack, Plan
from billing.pricing.costs import Costs
from billing.pricing.modifiers import Pricing
from billing.pricing.prices import Price
from billing.usage import Name, TenantId


class Model(BaseModel):
    """One thing a client can name as ``model``: an adapter, or the base model itself."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}$")]
    price: Price
    path: str = ""
    """Where the adapter lies, local or any fsspec URL; empty for the base model."""
    digest: str = ""
    """SHA-256 of the adapter's files, 64 hex digits; empty for the base model."""
    tenants: tuple[TenantId, ...] | None = None
    """Tenants that may use it; ``None`` is public."""
    adapter_class: str = "default"
    """A coarse name under which usage is exported to Dodo."""
    pinned: bool = False

    @property
    def is_adapter(self) -> bool:
        return bool(self.path)

    @property
    def identity(self) -> str:
        """``name@digest`` with the digest's first 12 digits, as it stands on records and receipts."""
        return f"{self.id}@{self.digest[:12]}" if self.is_adapter else self.id

    def is_open_to(self, tenant: TenantId) -> bool:
        return self.tenants is None or tenant in self.tenants


class RejectedEntry(BaseModel):
    """A configured entry that is not served, and why."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str
    id: str
    reason: str


class Catalog(BaseModel):
    """Models, plans and packs in force. Equal content has an equal hash."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    models: tuple[Model, ...]
    plans: dict[Name, Plan]
    packs: dict[Name, Pack] = {}
    default_plan: Name
    pricing: Pricing = Pricing()
    """What changes a listed price from request to request."""
    costs: Costs | None = None
    """What the owner pays for a replica; only its own reports show it."""
    abuse: Abuse = Abuse()
    rejected: tuple[RejectedEntry, ...] = Field(default=(), validation_alias=AliasChoices("rejected", "quarantined"))
    retired: dict[Name, Plan] = Field(default_factory=dict, exclude=True)
    """Plans that were in force once: tenants on one stay, no other gets it. Not part of the content or its hash."""

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        ids = [model.id for model in self.models]
        twice = sorted({i for i in ids if ids.count(i) > 1})
        if twice:
            raise ValueError(f"model id used twice: {', '.join(twice)}")
        if self.default_plan not in self.plans:
            raise ValueError(f"default_plan {self.default_plan!r} is not one of the plans")
        return self

    @property
    def content_hash(self) -> str:
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()

    def remembering(self, plans: Mapping[str, Plan]) -> Self:
        """The same, with these plans retired where they are not in force."""
        return self.model_copy(update={"retired": {name: p for name, p in plans.items() if name not in self.plans}})

    def plan_named(self, name: str) -> Plan | None:
        """A plan in force, or a retired one."""
        return self.plans.get(name) or self.retired.get(name)

    def by_id(self) -> Mapping[str, Model]:
        return {model.id: model for model in self.models}

    def open_to(self, tenant: TenantId, scope: tuple[str, ...] | None) -> tuple[Model, ...]:
        """Models that this tenant's key may use; ``scope`` is the key's own list, ``None`` all."""
        return tuple(m for m in self.models if m.is_open_to(tenant) and (scope is None or m.id in scope))

    def find(self, model_id: str, tenant: TenantId, scope: tuple[str, ...] | None) -> Model:
        """The model a request names.

        Raises:
            UnknownModel: nothing of that id is served, or it is private to others.
            ModelNotAllowed: it exists, and this key's scope leaves it out.
        """
        model = self.by_id().get(model_id)
        if model is None or not model.is_open_to(tenant):
            raise UnknownModel(model_id)
        if scope is not None and model_id not in scope:
            raise ModelNotAllowed(model_id)
        return model
