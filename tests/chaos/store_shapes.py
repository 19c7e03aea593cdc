"""Compare the ledger with its model on a cluster of three nodes, and while sentinels replace a killed primary.

The replica is in step when its primary is killed, so that the store must equal the model after each failover.
"""

import tempfile
from collections.abc import Coroutine
from pathlib import Path
from typing import ClassVar, TypeVar

from tests.chaos.store_load import until_served
from tests.chaos.table import Row
from tests.support.fleet import Fleet, cluster, replace_primary, watched
from tests.support.ledger_machine import LedgerMachine, drive
from tests.support.samples import ACME

NAME = "store-shapes"
EXAMPLES, STEPS = 100, 40
FAILOVERS = 3
BETWEEN = 1_000
"""Movements and queries between two failovers."""
T = TypeVar("T")


class ThroughFailovers(LedgerMachine):
    """The state machine, with the primary killed between two movements again and again."""

    fleet: ClassVar[Fleet]
    calls: ClassVar[int] = 0
    failovers: ClassVar[int] = 0

    def run(self, work: Coroutine[None, None, T]) -> T:
        result = super().run(work)
        type(self).calls += 1
        if self.calls >= BETWEEN * (self.failovers + 1) and self.failovers < FAILOVERS:
            type(self).failovers += 1
            self._fail_over()
        return result

    def _fail_over(self) -> None:
        primary = self.fleet.servers[0]
        with primary.client as client:
            client.set("fb:pulse", "")
            assert client.wait(1, 5_000) == 1, "the replica is not in step"
        replace_primary(self.fleet)
        _relax(self.fleet)
        super().run(until_served(self.ledger, ACME))


def run() -> list[Row]:
    return [_on_a_cluster(), _behind_sentinels()]


def _on_a_cluster() -> Row:
    with tempfile.TemporaryDirectory(prefix="fb") as name, cluster(Path(name)) as fleet:
        _relax(fleet)
        drive(fleet.url, EXAMPLES, STEPS)
    return Row("state machine on a 3-node cluster", EXAMPLES * STEPS, 0, 0, 0)


def _behind_sentinels() -> Row:
    with tempfile.TemporaryDirectory(prefix="fb") as name, watched(Path(name)) as fleet:
        _relax(fleet)
        ThroughFailovers.fleet = fleet
        drive(fleet.url, EXAMPLES, STEPS, ThroughFailovers)
    assert ThroughFailovers.failovers == FAILOVERS, f"{ThroughFailovers.failovers} failovers fell in the run"
    return Row("state machine through sentinel failovers", FAILOVERS, 0, 0, 0)


def _relax(fleet: Fleet) -> None:
    """Turn syncing off: this scenario tests no durability, and runs faster without."""
    for server in fleet.servers:
        with server.client as client:
            client.config_set("appendfsync", "no")
