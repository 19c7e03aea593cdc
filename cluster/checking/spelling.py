"""Finds keys that a pydantic schema does not have, at any depth, and suggests the nearest known key.

Ray's schema ignores unknown keys: a misspelt one would be deployed and have no effect.
"""

import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Annotated, Union, get_args, get_origin

from pydantic import AliasChoices, BaseModel
from pydantic.fields import FieldInfo

from cluster.checking.document import Place


@dataclass(frozen=True, slots=True)
class UnknownKey:
    """A key that the schema does not have."""

    place: Place
    known: tuple[str, ...]
    """The keys that the schema has in its place."""

    @property
    def problem(self) -> str:
        return f"unknown key `{self.place[-1]}`: {did_you_mean(str(self.place[-1]), self.known)}"


def did_you_mean(word: str, known: tuple[str, ...]) -> str:
    """Suggest the nearest known word, or name all of them."""
    near = get_close_matches(word.lower(), known, n=1, cutoff=0.6)
    return f"did you mean `{near[0]}`?" if near else f"known keys are {', '.join(known)}"


def unknown_keys(value: object, schema: object, place: Place = ()) -> Iterator[UnknownKey]:
    """Every key under ``value`` that ``schema`` does not have; it is a pydantic model or an annotation with models."""
    choices = tuple(_choices(schema))
    if isinstance(value, Mapping):
        model = next((c for c in choices if isinstance(c, type) and issubclass(c, BaseModel)), None)
        if model is not None:
            yield from _unknown_in_model(value, model, place)
            return
        for inside in _arguments(choices, dict, Mapping):
            for key, item in value.items():
                yield from unknown_keys(item, inside[1], (*place, str(key)))
    elif isinstance(value, list):
        for inside in _arguments(choices, list, tuple):
            for position, item in enumerate(value):
                yield from unknown_keys(item, inside[0], (*place, position))


def _unknown_in_model(value: Mapping[object, object], model: type[BaseModel], place: Place) -> Iterator[UnknownKey]:
    fields = {name: field for field_name, field in model.model_fields.items() for name in _names(field_name, field)}
    for key, item in value.items():
        here = (*place, str(key))
        if key not in fields:
            yield UnknownKey(here, tuple(sorted(fields)))
        else:
            yield from unknown_keys(item, fields[str(key)].annotation, here)


def _names(field_name: str, field: FieldInfo) -> Iterator[str]:
    """A field's name and its aliases."""
    yield field_name
    alias = field.validation_alias
    yield from (str(choice) for choice in (alias.choices if isinstance(alias, AliasChoices) else (alias,)) if choice)


def _choices(schema: object) -> Iterator[object]:
    """The members of a union, unwrapped."""
    origin = get_origin(schema)
    if origin is Annotated:
        yield from _choices(get_args(schema)[0])
    elif origin in (Union, types.UnionType):
        for member in get_args(schema):
            yield from _choices(member)
    else:
        yield schema


def _arguments(choices: tuple[object, ...], *origins: object) -> Iterator[tuple[object, ...]]:
    """The type arguments of the first container among ``choices`` that has any."""
    for choice in choices:
        if get_origin(choice) in origins and get_args(choice):
            yield get_args(choice)
            return
