"""Reconcile again and again: often with the store alone, now and then with Dodo too."""

from dataclasses import dataclass

from redis.asyncio import Redis

from billing.clock import Clock, now_ms
from billing.dodo.call_budget import Budget, CallBudget
from billing.dodo.client import Dodo
from billing.reconcile.dodo_comparison import DAY_MS
from billing.reconcile.proof_state import ProofState, show
from billing.reconcile.reconciler import Reconciler, Report
from billing.reports.history import archive_of

STORE, DODO = "store", "dodo"
"""Kinds of pass, as they are stored."""
CALLS_PER_MINUTE = 30
"""Of those to Dodo, at most: the exporter needs the rest."""


@dataclass
class Watch:
    redis: Redis
    dodo: Dodo
    budget: Budget
    clock: Clock = now_ms
    _reconciler: Reconciler | None = None
    _day: int = 0

    async def reconcile_store(self) -> ProofState:
        """Prove the store, reading only what is new; all since the watermark after a fault and on a new day."""
        day = self.clock() // DAY_MS
        if self._reconciler is None or day != self._day:
            self._reconciler, self._day = Reconciler(self.redis, archive=await archive_of(self.redis)), day
        report = await self._reconciler.run()
        if report.faults:
            self._reconciler = None
        return await self._shown(STORE, report)

    async def reconcile_dodo(self) -> ProofState:
        """Prove the store and Dodo's own sums, from the watermark on."""
        budget = CallBudget(CALLS_PER_MINUTE, within=self.budget)
        archive = await archive_of(self.redis)
        return await self._shown(DODO, await Reconciler(self.redis, self.dodo, archive, budget, self.clock).run())

    async def _shown(self, kind: str, report: Report) -> ProofState:
        first = next((f"{row.proof} {row.tenant}: {row.named}" for row in report.faults), "")
        state = ProofState(
            at_ms=self.clock(),
            proofs=len(report.rows),
            faults=len(report.faults),
            drift_nanos=report.drift_nanos,
            named=first,
            unproven="; ".join(report.unproven),
        )
        await show(self.redis, kind, state)
        return state
