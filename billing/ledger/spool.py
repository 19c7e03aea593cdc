"""Settlements that wait on this machine's disk while the store is away.

A settlement is appended before its sender gets an answer and removed only after the ledger has it. A crash in between
settles twice, which counts once.
"""

import asyncio
import errno
import fcntl
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from uuid import uuid4

from billing.errors import BillingError
from billing.ledger.account import Adjustment, Settlement
from billing.ledger.codec import pack_settlement, unpack_settlement
from billing.ledger.errors import (
    UNREADABLE,
    DuplicateRequest,
    GrantRefused,
    SourceReused,
    UnknownHold,
    UnresolvedSettlement,
)
from billing.ledger.ledger import Ledger
from billing.usage import Unit, UsageRecord

MAX_PENDING = 100_000
"""Settlements of one process, about 30 MB."""
BATCH = 2_000
REFUSED = "refused.txt"
"""Lines that the ledger refused, for the operator; never dropped."""
UNREADABLE_LINES = "unreadable.txt"
"""Lines that this version cannot read, so that no ledger was asked; never dropped."""
RETRY_S = 60.0
"""When a settlement is tried again of which the store has something that cannot be read."""


logger = logging.getLogger(__name__)


class SpoolFull(BillingError):
    """As many settlements wait as may; this process must admit nothing new."""


class Spool:
    """One process's waiting settlements, and those that a process which ended left in the same folder."""

    def __init__(self, folder: Path, max_pending: int = MAX_PENDING) -> None:
        self._folder, self._max_pending = folder, max_pending
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._guard = threading.Lock()
        self._file = _create(folder)
        self._pending = 0
        self._retry_at: dict[str, float] = {}
        """Lines that are tried again later, and when, by the monotonic clock."""
        self._adopt()

    @property
    def pending(self) -> int:
        """Settlements on disk that the ledger is not known to have."""
        return self._pending

    @property
    def refused(self) -> int:
        """Settlements in this folder that the ledger refused; the operator must look at them. Reads the disk."""
        return self._count(REFUSED)

    @property
    def unreadable(self) -> int:
        """Lines in this folder that cannot be read; the operator must look at them. Reads the disk."""
        return self._count(UNREADABLE_LINES)

    def _count(self, name: str) -> int:
        try:
            return (self._folder / name).read_bytes().count(b"\n")
        except FileNotFoundError:
            return 0

    def append(self, settlement: Settlement) -> None:
        """Keep a settlement; it is on disk on return. Any thread may call it.

        Raises:
            SpoolFull: the bound is reached.
            OSError: the disk does not take it.
        """
        if self._pending >= self._max_pending:
            raise SpoolFull(f"{self._pending} settlements wait for the store")
        with self._guard:
            self._file.append([pack_settlement(settlement)])
            self._pending += 1

    async def replay(self, ledger: Ledger) -> int:
        """Settle what waits, oldest first, and what processes that ended have left here.

        Where nothing waits it reads the folder and touches no store. A settlement of which the store has something
        that cannot be read goes on waiting, and keeps no other from being settled.

        Returns:
            How many left the spool, those that the ledger refused and those that cannot be read included.

        Raises:
            StoreUnavailable: the rest goes on waiting.
        """
        await asyncio.to_thread(self._adopt)
        done = 0
        while self._pending and (batch := await asyncio.to_thread(self._oldest)):
            gone: list[str] = []
            try:
                for line in batch:
                    if await self._settle(line, ledger):
                        gone.append(line)
            finally:
                await asyncio.to_thread(self._forget, gone)
            done += len(gone)
        return done

    def close(self) -> None:
        """Leave what waits to the next process."""
        if self._pending:
            self._file.handle.close()
        else:
            self._file.remove()

    async def _settle(self, line: str, ledger: Ledger) -> bool:
        """Is this line done with?"""
        try:
            settlement = unpack_settlement(line)
        except UNREADABLE as error:
            logger.critical(
                "a settlement cannot be read, and is kept in %s: %s", self._folder / UNREADABLE_LINES, error
            )
            await asyncio.to_thread(self._set_aside, UNREADABLE_LINES, line, f"{type(error).__name__}: {error}")
            return True
        try:
            receipt = await ledger.settle(settlement)
            if settlement.is_undelivered and receipt.is_repeat:
                await _give_back(ledger, receipt.record)
        except UnresolvedSettlement as error:
            logger.warning("%s", error)
        except (UnknownHold, DuplicateRequest, GrantRefused, SourceReused) as refusal:
            logger.critical("a settlement is refused, and is kept in %s: %s", self._folder / REFUSED, refusal)
            await asyncio.to_thread(self._set_aside, REFUSED, line, str(refusal))
        except UNREADABLE as error:
            message = "settlement %s waits, since what the store has of it cannot be read: %s: %s"
            logger.error(message, settlement.request_id, type(error).__name__, error)
            self._retry_at[line] = time.monotonic() + RETRY_S
            return False
        return True

    def _oldest(self) -> list[str]:
        now = time.monotonic()
        with self._guard:
            return [line for line in self._file.lines() if self._retry_at.get(line, now) <= now][:BATCH]

    def _set_aside(self, name: str, line: str, reason: str) -> None:
        with self._guard, (self._folder / name).open("a", encoding="utf-8") as kept:
            kept.write(f"{' '.join(reason.split())}\t{line}\n")
            kept.flush()
            os.fsync(kept.fileno())

    def _forget(self, gone: Sequence[str]) -> None:
        """Put the other lines into a file that takes the old one's place."""
        if not gone:
            return
        with self._guard:
            old, left, rest = self._file, Counter(gone), []
            for line in old.lines():
                if left[line]:
                    left[line] -= 1
                    self._retry_at.pop(line, None)
                else:
                    rest.append(line)
            self._file = _create(self._folder)
            self._file.append(rest)
            self._pending = len(rest)
            old.remove()

    def _adopt(self) -> None:
        """Take over files whose process has ended: the kernel released their locks."""
        for path in sorted(self._folder.glob("settles-*.jsonl")):
            file = None if path == self._file.path else _open_locked(path)
            if file is None:
                continue
            if lines := file.lines():
                with self._guard:
                    self._file.append(lines)
                    self._pending += len(lines)
            file.remove()


async def _give_back(ledger: Ledger, record: UsageRecord) -> None:
    """Give back, once, what a record charged for an answer that was not delivered."""
    reason = f"{record.record_id} charged an answer that was not delivered"
    for unit in Unit:
        if amount := sum(draw.amount for draw in record.draws if draw.unit is unit):
            source = f"undelivered:{record.record_id}"
            await ledger.adjust(Adjustment(source, record.tenant, unit, amount, reason))


@dataclass(frozen=True, slots=True)
class _File:
    """A locked file of lines. Half a line at its end was never acknowledged to its sender."""

    path: Path
    handle: FileIO

    def lines(self) -> list[str]:
        self.handle.seek(0)
        return self.handle.read().decode(errors="replace").split("\n")[:-1]

    def append(self, lines: Sequence[str]) -> None:
        """All of them and on disk, or none."""
        data = "".join(line + "\n" for line in lines).encode()
        size = self.handle.seek(0, os.SEEK_END)
        try:
            if data and self.handle.write(data) != len(data):
                raise OSError(errno.ENOSPC, "the disk is full", str(self.path))
            os.fsync(self.handle.fileno())
        except OSError:
            self.handle.truncate(size)
            raise

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
        self.handle.close()


def _create(folder: Path) -> _File:
    """A new file, locked for as long as we live and from before it has the name that others look for."""
    name = f"{uuid4().hex}.jsonl"
    file = _open_locked(folder / f"new-{name}")
    assert file is not None, "no other process has the name yet"
    path = file.path.rename(folder / f"settles-{name}")
    directory = os.open(folder, os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)
    return _File(path, file.handle)


def _open_locked(path: Path) -> _File | None:
    """The file, or nothing where a living process has it or it has just been taken over."""
    try:
        handle = path.open("rb+" if path.name.startswith("settles-") else "xb+", buffering=0)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        handle.close()
        return None
    return _File(path, handle)
