"""Checks that every key is known and every value is allowed, by Ray's schema and farebox's."""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from ray.serve.config import AutoscalingConfig
from ray.serve.schema import ServeDeploySchema

from cluster.checking.document import Document, Place
from cluster.checking.findings import Finding
from cluster.checking.spelling import unknown_keys

T = TypeVar("T", bound=BaseModel)

HINTS: Mapping[str, str] = {
    "price": 'every model needs one, at least `price: {output_per_1m: "1.00"}`',
    "path": "the adapter's folder or URL",
    "id": "what clients send as `model`",
    "plans": "at least the default plan",
    "default_plan": "the plan of tenants that are created without one",
    "base": "the base model's own entry: `id` and `price`",
    "kind": "free, prepaid, pay_as_you_go or subscription",
}


class Shape:
    """Checks parts of one document and collects the findings."""

    def __init__(self, document: Document) -> None:
        self._document = document
        self.findings: list[Finding] = []
        self._reported: set[Place] = set()
        for place in document.duplicates:
            self.add(place, "this key is there twice, and only the last one counts: remove one")

    def add(self, place: Place, problem: str, *, is_warning: bool = False) -> None:
        """Add a finding about a place in the file."""
        where = describe(place, self._document.values)
        self.findings.append(Finding(where, problem, self._document.line(place), is_warning))

    def spelling(self, place: Place, schema: object) -> None:
        """Report keys at and under ``place`` that ``schema`` does not have."""
        for unknown in unknown_keys(value_at(self._document.values, place), schema, place):
            self._reported.add(unknown.place)
            self.add(unknown.place, unknown.problem)

    def serve(self) -> None:
        """Check against Ray's schema, and report unknown keys, which Ray ignores."""
        self.spelling((), ServeDeploySchema)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self.parsed((), ServeDeploySchema)
            for place in deployments(self._document.values):
                if isinstance(value_at(self._document.values, (*place, "autoscaling_config")), Mapping):
                    self.parsed((*place, "autoscaling_config"), AutoscalingConfig)
        for message in dict.fromkeys(str(warning.message) for warning in caught):
            self.add((), message, is_warning=True)

    def parsed(self, place: Place, schema: type[T]) -> T | None:
        """The value at ``place`` as a model; or ``None``, with a finding for each error."""
        try:
            return schema.model_validate(value_at(self._document.values, place))
        except ValidationError as error:
            self._add_errors(place, error.errors(include_url=False, include_context=False))
        except (ValueError, TypeError, ImportError, AttributeError) as error:  # Ray's validators raise these
            self.add(place, str(error))
        return None

    def _add_errors(self, place: Place, details: Iterable[ErrorDetails]) -> None:
        problems: dict[Place, list[str]] = {}
        for detail in details:
            here = tuple(_existing(self._document.values, (*place, *detail["loc"]), detail["type"] == "missing"))
            if here not in self._reported:
                problems.setdefault(here, []).append(_message(detail, here))
        for here, messages in problems.items():
            self.add(here, " or ".join(dict.fromkeys(messages)))


def _message(detail: ErrorDetails, place: Place) -> str:
    if detail["type"] == "missing":
        name = str(place[-1])
        return f"`{name}` is missing" + (f": {HINTS[name]}" if name in HINTS else "")
    message = detail["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    shown = repr(detail["input"])
    is_small = not isinstance(detail["input"], Mapping | list) and len(shown) <= 60
    return f"{message}, not {shown}" if is_small and shown not in message else message


def _existing(values: object, place: Place, is_missing: bool) -> Iterator[str | int]:
    """The part of a place that the file has: pydantic also puts the names of a union's members into it."""
    for position, step in enumerate(place):
        inside = _step(values, step)
        if inside is None:
            if is_missing and position == len(place) - 1:
                yield step
            return
        yield step
        values = inside[0]


def deployments(values: object) -> Iterator[Place]:
    """The place of each deployment of each application."""
    apps = value_at(values, ("applications",))
    for number in range(len(apps) if isinstance(apps, list) else 0):
        listed = value_at(values, ("applications", number, "deployments"))
        for position in range(len(listed) if isinstance(listed, list) else 0):
            yield ("applications", number, "deployments", position)


def value_at(values: object, place: Place) -> object:
    """The value at a place, or ``None``."""
    for step in place:
        inside = _step(values, step)
        if inside is None:
            return None
        values = inside[0]
    return values


def _step(values: object, step: str | int) -> tuple[object] | None:
    if isinstance(values, Mapping) and step in values:
        return (values[step],)
    if isinstance(values, list) and isinstance(step, int) and step < len(values):
        return (values[step],)
    return None


def describe(place: Place, values: object) -> str:
    """A place in words, with the ``id`` or ``name`` of list items instead of their position."""
    words: list[str] = []
    for depth, step in enumerate(place):
        if isinstance(step, str):
            words.append(step)
            continue
        item = value_at(values, place[: depth + 1])
        name = item.get("id") or item.get("name") if isinstance(item, Mapping) else None
        words.append(str(name or f"#{step + 1}"))
    plain = [word for word in words if word not in ("applications", "deployments", "user_config")]
    return " > ".join(plain)
