"""The sandbox's state: one SQLite file that survives a crash.

Resources are JSON by kind and id; events and webhook messages have tables of their own. One event loop uses the store,
and no method awaits, so that requests do not interleave within one.
"""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from cluster.dodo_sandbox.wire import Resource

R = TypeVar("R", bound=Resource)

SCHEMA = """
CREATE TABLE IF NOT EXISTS resources (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, kind TEXT NOT NULL, id TEXT NOT NULL, owner TEXT, body TEXT NOT NULL,
    UNIQUE (kind, id)
);
CREATE INDEX IF NOT EXISTS resources_by_owner ON resources (kind, owner);
CREATE TABLE IF NOT EXISTS settings (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS events (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, event_id TEXT NOT NULL UNIQUE, customer_id TEXT NOT NULL,
    event_name TEXT NOT NULL, timestamp_ms INTEGER NOT NULL, ingested_ms INTEGER NOT NULL, body TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS events_by_customer ON events (customer_id, event_name, timestamp_ms);
CREATE TABLE IF NOT EXISTS messages (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, type TEXT NOT NULL, kind TEXT NOT NULL,
    resource_id TEXT NOT NULL, payment_id TEXT, emitted_ms INTEGER NOT NULL
);
CREATE TABLE IF NOT EXISTS deliveries (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, message_id TEXT NOT NULL, endpoint_id TEXT NOT NULL,
    attempts INTEGER NOT NULL DEFAULT 0, due_ms INTEGER NOT NULL, state TEXT NOT NULL DEFAULT 'pending',
    last_status TEXT NOT NULL DEFAULT '', UNIQUE (message_id, endpoint_id)
);
CREATE INDEX IF NOT EXISTS deliveries_due ON deliveries (state, due_ms);
"""


class Store:
    """The state file in ``state_dir``, which is created with mode 0700."""

    def __init__(self, state_dir: Path) -> None:
        state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.db = sqlite3.connect(state_dir / "dodo.sqlite3", isolation_level=None, check_same_thread=False)
        self.db.execute("PRAGMA journal_mode=WAL")
        self.db.execute("PRAGMA synchronous=NORMAL")
        self.db.executescript(SCHEMA)

    def close(self) -> None:
        self.db.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All writes inside take effect together or not at all. A nested transaction is part of the outer one."""
        if self.db.in_transaction:
            yield
            return
        self.db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self.db.execute("ROLLBACK")
            raise
        self.db.execute("COMMIT")

    def put(self, resource: Resource) -> None:
        self.db.execute(
            "INSERT INTO resources (kind, id, owner, body) VALUES (?, ?, ?, ?)"
            " ON CONFLICT (kind, id) DO UPDATE SET owner = excluded.owner, body = excluded.body",
            (resource.kind, resource.key, resource.owner, resource.model_dump_json()),
        )

    def get(self, kind: type[R], resource_id: str) -> R | None:
        row = self.db.execute(
            "SELECT body FROM resources WHERE kind = ? AND id = ?", (kind.kind, resource_id)
        ).fetchone()
        return kind.model_validate_json(row[0]) if row else None

    def find(self, kind: type[R], owner: str | None = None) -> list[R]:
        """All resources of a kind, or those of one owner, the newest first."""
        rows = self.db.execute(
            "SELECT body FROM resources WHERE kind = ?1 AND (?2 IS NULL OR owner = ?2) ORDER BY seq DESC",
            (kind.kind, owner),
        )
        return [kind.model_validate_json(body) for (body,) in rows]

    def newest(self, kind: type[R], owner: str) -> R | None:
        row = self.db.execute(
            "SELECT body FROM resources WHERE kind = ? AND owner = ? ORDER BY seq DESC LIMIT 1", (kind.kind, owner)
        ).fetchone()
        return kind.model_validate_json(row[0]) if row else None

    def delete(self, resource: Resource) -> None:
        self.db.execute("DELETE FROM resources WHERE kind = ? AND id = ?", (resource.kind, resource.key))

    def setting(self, name: str) -> str | None:
        row = self.db.execute("SELECT value FROM settings WHERE name = ?", (name,)).fetchone()
        return str(row[0]) if row else None

    def set_setting(self, name: str, value: str) -> None:
        self.db.execute("INSERT OR REPLACE INTO settings VALUES (?, ?)", (name, value))
