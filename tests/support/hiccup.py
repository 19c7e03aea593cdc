"""A store that is away for a moment."""

import pytest

from billing.notices.log import Notices
from billing.store.errors import StoreUnavailable


def fail_next_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    """The store is away when the next notice is recorded, and back after it."""
    record = Notices.record

    async def away(*_: object) -> bool:
        monkeypatch.setattr(Notices, "record", record)
        raise StoreUnavailable("away for a moment")

    monkeypatch.setattr(Notices, "record", away)
