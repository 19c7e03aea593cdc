"""Run a periodic task item by item, so that an item that fails keeps no other waiting.

An item is whatever a task goes through: tenants, shards, subscriptions, webhooks. One that fails is counted, logged
with its id and left out for a while, which doubles with each failure. Several failures in a row end the run: then
the cause is rather the store, or Dodo, than the items.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

from billing.clock import Clock, now_ms

FIRST_RETRY_MS, MAX_RETRY_MS = 5_000, 3_600_000
FAILURES_IN_A_ROW = 5
"""So many items that fail one after the other end a run: not they are the cause, but the store, or Dodo."""
STUCK_FAILURES = 5
"""An item that failed so often, which takes more than a minute, is stuck."""
ITEM_LIMIT_S = 60.0
MAX_ERROR_LENGTH = 500
MAX_REMEMBERED = 10_000
"""Failing items that are remembered; the one that failed first is then forgotten, and tried at once."""

log = logging.getLogger("farebox.billing.sweep")

Item = TypeVar("Item")
Result = TypeVar("Result")


class EndOfRun(Exception):
    """Raised for an item that has to wait, and all behind it, for the next run. It has not failed."""


@dataclass(frozen=True, slots=True)
class FailingItem:
    """An item whose last try failed."""

    id: str
    failures: int
    """In a row."""
    retry_at_ms: int
    error: str
    error_type: type[Exception]

    @property
    def is_stuck(self) -> bool:
        return self.failures >= STUCK_FAILURES


class Sweep:
    """Remembers, from run to run of one task, which items fail and where the last run ended.

    ``ends_after``: so many failures in a row end a run, ``None`` for none. ``ends_on``: errors that end it at once and
    count for no item.
    """

    def __init__(
        self,
        name: str,
        clock: Clock = now_ms,
        ends_after: int | None = FAILURES_IN_A_ROW,
        ends_on: tuple[type[Exception], ...] = (),
    ) -> None:
        self.name = name
        self._clock, self._ends_after, self._ends_on = clock, ends_after, ends_on
        self._failing: dict[str, FailingItem] = {}
        self._turn: list[str] = []
        """The items of the last run in the order it took them; empty once a run came to all."""
        self._place = 0
        """How many of them it came to before it ended early: the next run begins with the others."""
        self.includes: tuple[Sweep, ...] = ()
        """Others, whose failing items are shown with this one's."""

    @property
    def failing(self) -> tuple[FailingItem, ...]:
        return (*self._failing.values(), *(one for sweep in self.includes for one in sweep.failing))

    async def run(
        self,
        items: Iterable[Item],
        act: Callable[[Item], Awaitable[Result]],
        id_of: Callable[[Item], str] = str,
        is_forced: bool = False,
        own: tuple[type[Exception], ...] = (),
    ) -> list[Result]:
        """Call ``act`` with each item and return the results of those that went well.

        ``is_forced`` also tries those that failed shortly before. ``own``: errors that are surely the item's own, so
        that no number of them in a row ends the run.

        Raises:
            Exception: what ended the run.
        """
        results: list[Result] = []
        failures_in_a_row = 0
        self._forget_old()
        turn = self._in_turn([(id_of(item), item) for item in items])
        self._turn = [id_ for id_, _ in turn]
        for place, (id_, item) in enumerate(turn):
            self._place = place
            if not is_forced and self._is_left_out(id_):
                continue
            self._place += 1
            try:
                async with asyncio.timeout(ITEM_LIMIT_S):
                    results.append(await act(item))
            except EndOfRun:
                self._place = place
                return results
            except self._ends_on:
                self._place = place
                raise
            except Exception as error:  # whatever it is, it is this item's
                self._note_failure(id_, error)
                if isinstance(error, own):
                    continue
                failures_in_a_row += 1
                if failures_in_a_row == self._ends_after:
                    raise
            else:
                self._failing.pop(id_, None)
                failures_in_a_row = 0
        self._turn = []
        return results

    def failures_of(self, id_: str) -> int:
        """How often an item failed in a row."""
        known = self._failing.get(id_)
        return 0 if known is None else known.failures

    def _in_turn(self, items: list[tuple[str, Item]]) -> list[tuple[str, Item]]:
        """First those that the last run did not come to, in its order; then the others, new ones among them.

        So no item comes before one that waits, and each has its turn, however the list changes from run to run.
        """
        waiting = {id_: place for place, id_ in enumerate(self._turn[self._place :])}
        return sorted(items, key=lambda one: waiting.get(one[0], len(waiting)))

    def _is_left_out(self, id_: str) -> bool:
        known = self._failing.get(id_)
        return known is not None and self._clock() < known.retry_at_ms

    def _note_failure(self, id_: str, error: Exception) -> None:
        known = self._failing.pop(id_, None)
        failures = 1 if known is None else known.failures + 1
        pause_ms = min(MAX_RETRY_MS, FIRST_RETRY_MS * 2 ** min(failures - 1, 20))
        text = " ".join(f"{type(error).__name__}: {error}".split())[:MAX_ERROR_LENGTH]
        if len(self._failing) >= MAX_REMEMBERED:
            del self._failing[next(iter(self._failing))]
        self._failing[id_] = FailingItem(id_, failures, self._clock() + pause_ms, text, type(error))
        message = "%s: %s failed %d times in a row, next try in %d s: %s"
        log.warning(message, self.name, id_, failures, pause_ms // 1_000, text)

    def _forget_old(self) -> None:
        """Leave out items that were not among those of a run for long: they are gone, or were finished elsewhere."""
        before = self._clock() - MAX_RETRY_MS
        self._failing = {id_: one for id_, one in self._failing.items() if one.retry_at_ms > before}
