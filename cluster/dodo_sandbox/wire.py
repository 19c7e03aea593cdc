"""What all resources share: ids, metadata, pages, times and intervals.

Every resource model mirrors the type of the same name in the ``dodopayments`` SDK; tests validate answers with it.
"""

import calendar
import secrets
from abc import ABC, abstractmethod
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Annotated, ClassVar, Generic, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, StrictStr

BUSINESS_ID = "bus_sandbox"
BRAND_ID = "brnd_sandbox"
METADATA_PAIRS_MAX = 50
METADATA_KEY_MAX = 100
METADATA_VALUE_MAX = 500

Interval = Literal["Day", "Week", "Month", "Year"]
Currency = Annotated[str, Field(pattern=r"^[A-Z]{3}$")]
Cents = Annotated[int, Field(ge=0, le=2**53)]
"""An amount in the currency's smallest unit."""

_ID_ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


def new_id(prefix: str) -> str:
    return f"{prefix}_{''.join(secrets.choice(_ID_ALPHABET) for _ in range(20))}"


def metadata_fault(metadata: "Metadata") -> str | None:
    """Why Dodo refuses this metadata (limits of ``usage_events.ingest``), or ``None``."""
    if len(metadata) > METADATA_PAIRS_MAX:
        return f"metadata has {len(metadata)} pairs, at most {METADATA_PAIRS_MAX} are allowed"
    for key, value in metadata.items():
        if len(key) > METADATA_KEY_MAX:
            return f"metadata key {key[:20]}… is longer than {METADATA_KEY_MAX} characters"
        if isinstance(value, str) and len(value) > METADATA_VALUE_MAX:
            return f"metadata value of {key} is longer than {METADATA_VALUE_MAX} characters"
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            return f"metadata value of {key} does not fit 64 bits"
    return None


def _within_limits(metadata: "Metadata") -> "Metadata":
    if fault := metadata_fault(metadata):
        raise ValueError(fault)
    return metadata


Metadata = dict[str, StrictStr | StrictInt | StrictFloat | StrictBool]
LimitedMetadata = Annotated[Metadata, AfterValidator(_within_limits)]


class Wire(BaseModel):
    """A model of a request or an answer. Like Dodo, it ignores unknown fields."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Resource(Wire, ABC):
    """A stored model. ``kind`` is its type, ``key`` its id, ``owner`` the id of its customer or subscription."""

    kind: ClassVar[str]

    @property
    @abstractmethod
    def key(self) -> str:
        """The id in the store."""

    @property
    def owner(self) -> str | None:
        return None


T = TypeVar("T")


class Page(Wire, Generic[T]):
    items: Sequence[T]


class Paging(Wire):
    """Pages from 0, of 10 by default and at most 100 items (docstrings of the SDK's list parameters)."""

    page_number: Annotated[int, Field(ge=0)] = 0
    page_size: Annotated[int, Field(ge=1, le=100)] = 10

    def of(self, items: Sequence[T]) -> Page[T]:
        start = self.page_number * self.page_size
        return Page(items=items[start : start + self.page_size])


def moment(now_ms: int) -> datetime:
    return datetime.fromtimestamp(now_ms // 1000, UTC) + timedelta(milliseconds=now_ms % 1000)


def in_utc(value: datetime) -> datetime:
    """The time in UTC; one without a zone is taken as UTC."""
    return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


UtcTime = Annotated[datetime, AfterValidator(in_utc)]


def to_ms(value: datetime) -> int:
    return (in_utc(value) - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(milliseconds=1)


def add_interval(start: datetime, count: int, interval: Interval) -> datetime:
    """The date ``count`` intervals later; in a shorter month, the 31st becomes the last day."""
    if interval in ("Day", "Week"):
        return start + timedelta(days=count * (7 if interval == "Week" else 1))
    months = start.year * 12 + start.month - 1 + count * (12 if interval == "Year" else 1)
    year, month = divmod(months, 12)
    day = min(start.day, calendar.monthrange(year, month + 1)[1])
    return start.replace(year=year, month=month + 1, day=day)
