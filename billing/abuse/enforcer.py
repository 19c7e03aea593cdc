"""Puts keys that are used like stolen ones into quarantine, and tells their owner; lifted, they are left alone a day.

Safe to repeat: a key is put there once, and its notice told once.
"""

from dataclasses import dataclass

from billing.abuse.addresses import Sightings
from billing.abuse.rules import Habits, Verdict
from billing.catalog.abuse import Abuse
from billing.clock import Clock, now_ms
from billing.notices.log import Notices
from billing.notices.notice import Notice, NoticeKind
from billing.tenants.directory import Tenants
from billing.tenants.errors import UnknownKey
from billing.tenants.tenant import ApiKey, Quarantine

REST_MS = 24 * 3_600_000
"""How long a key that a person lifted is not put back."""


@dataclass(frozen=True, slots=True)
class Warden:
    tenants: Tenants
    notices: Notices
    sightings: Sightings
    habits: Habits
    clock: Clock = now_ms

    async def run_once(self, abuse: Abuse) -> int:
        """How many notices were new."""
        now, told = self.clock(), 0
        self.habits.forget(now)
        if not abuse.watch:
            return 0
        addresses = await self.sightings.counts(self.habits.used_in(now))
        for verdict in self.habits.verdicts(abuse, addresses, now):
            told += await self._put(verdict, now)
        return told

    async def _put(self, verdict: Verdict, now: int) -> bool:
        def quarantined(key: ApiKey) -> ApiKey:
            is_left_alone = key.revoked_at_ms or key.quarantine or now < key.lifted_at_ms + REST_MS
            reason = Quarantine(reason=verdict.reason.value, detail=verdict.detail, since_ms=now)
            return key if is_left_alone else key.model_copy(update={"quarantine": reason})

        try:
            key = await self.tenants.change_key(verdict.tenant, verdict.key_id, quarantined)
        except UnknownKey:
            return False
        return key.quarantine is not None and await self.notices.tell(_notice(key, key.quarantine))


def _notice(key: ApiKey, why: Quarantine) -> Notice:
    facts = {
        "key": key.id,
        "name": key.name,
        "begins": key.shown,
        "reason": why.reason,
        "detail": why.detail,
        "remedy": f"farebox keys lift {key.tenant} {key.id}, or revoke",
    }
    return Notice(NoticeKind.KEY_QUARANTINED, key.tenant, f"quarantine:{key.id}:{why.since_ms}", why.since_ms, facts)
