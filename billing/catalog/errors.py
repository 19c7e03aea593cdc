"""Refusals about what is for sale."""

from dataclasses import dataclass

from billing.errors import LONGEST_SHOWN, Refusal


@dataclass(eq=False)
class UnknownModel(Refusal):
    model: str

    def __str__(self) -> str:
        return f"model {self.model[:LONGEST_SHOWN]!r} does not exist: GET /v1/models lists those you may use"


@dataclass(eq=False)
class ModelNotAllowed(Refusal):
    model: str

    def __str__(self) -> str:
        return f"this key may not use model {self.model!r}: GET /v1/models lists those it may"
