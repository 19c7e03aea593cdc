"""Throttle keys that are used like stolen ones, and record a notice for their owner.

Safe to repeat: a key is throttled once, and its notice recorded once. A key that a person lifted is left alone a day.
"""

import logging
from dataclasses import dataclass

from pydantic import ValidationError

from billing.abuse.addresses import AddressSketches
from billing.abuse.rules import Habits, Verdict
from billing.catalog.abuse import Abuse
from billing.clock import Clock, now_ms
from billing.notices.log import Notices
from billing.notices.notice import Notice, NoticeKind
from billing.sweep import Sweep
from billing.tenants.directory import Tenants
from billing.tenants.errors import UnknownKey
from billing.tenants.tenant import ApiKey, Throttle
from billing.usage import TenantId

LEFT_ALONE_MS = 24 * 3_600_000
"""How long a key that a person lifted is not throttled again."""

log = logging.getLogger("farebox.billing.abuse.enforcer")


@dataclass(frozen=True, slots=True)
class AbuseEnforcer:
    tenants: Tenants
    notices: Notices
    address_sketches: AddressSketches
    habits: Habits
    clock: Clock = now_ms

    async def run_once(self, abuse: Abuse, sweep: Sweep) -> int:
        """Throttle every key whose use is unusual now. How many notices were new."""
        now = self.clock()
        self.habits.forget(now)
        if not abuse.watch:
            return 0
        for tenant in sorted(self.habits.unplaced(now)):
            await self._place_keys_of(tenant)
        addresses = await self.address_sketches.counts(self.habits.rows_in(now))
        verdicts = self.habits.verdicts(abuse, addresses, now)
        return sum(await sweep.run(verdicts, self._throttle, id_of=lambda one: f"{one.tenant}/{one.key_id}"))

    async def _place_keys_of(self, tenant: TenantId) -> None:
        """Let keys go on with the past of those they replaced. Keys that cannot be read are judged by their own."""
        try:
            stored = {key.id: key for key in await self.tenants.keys(tenant)}
        except ValidationError as error:
            log.warning("keys of %s cannot be read, and are judged each alone: %s", tenant, error)
            return
        for key in self.habits.keys_of(tenant):
            known = stored.get(key[1])
            self.habits.count_as(key, (tenant, known.counts_as) if known and known.counts_as else key)

    async def _throttle(self, verdict: Verdict) -> bool:
        now = self.clock()

        def throttled(key: ApiKey) -> ApiKey:
            is_left_alone = key.revoked_at_ms or key.throttled or now < key.lifted_at_ms + LEFT_ALONE_MS
            reason = Throttle(reason=verdict.reason.value, detail=verdict.detail, since_ms=now)
            return key if is_left_alone else key.model_copy(update={"throttled": reason})

        try:
            key = await self.tenants.change_key(verdict.tenant, verdict.key_id, throttled)
        except UnknownKey:
            return False
        return key.throttled is not None and await self.notices.record(_notice(key, key.throttled))


def _notice(key: ApiKey, why: Throttle) -> Notice:
    facts = {
        "key": key.id,
        "name": key.name,
        "begins": key.shown,
        "reason": why.reason,
        "detail": why.detail,
        "remedy": f"farebox keys lift {key.tenant} {key.id}, or revoke",
    }
    return Notice(NoticeKind.KEY_THROTTLED, key.tenant, f"quarantine:{key.id}:{why.since_ms}", why.since_ms, facts)
