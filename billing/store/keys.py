"""The names of every key in the store, and which shard a tenant lives in.

All keys that one script touches share a hash tag, so that the same scripts run on a cluster.
"""

from dataclasses import dataclass
from zlib import crc32

from billing.usage import TenantId

SHARDS = 64
"""Fixed for ever: a tenant's shard is part of every one of its keys. Verified at start."""

SETTLED_WINDOWS = 4
"""A settled id is remembered for its stretch and the two after it; the fourth is being emptied."""

META = "fb:meta"
"""Hash: schema version and shard count."""
TENANTS = "fb:tenants"
"""Set of tenant ids."""
CUSTOMERS_WANTED = "fb:customers:wanted"
"""Set of tenant ids that have no Dodo customer yet."""
CUSTOMER_TENANTS = "fb:customers"
"""Hash: Dodo customer id to tenant id."""
CATALOG_CURRENT = "fb:catalogue:current"
"""String: content hash of the catalog in force."""
PLANS = "fb:plans"
"""Hash: name of every plan that was ever in force to JSON of what it last was."""
GATEWAYS = "fb:gateways"
"""Hash: gateway id to JSON with the catalog hash it serves and when it said so."""
DODO_IDS = "fb:dodo:ids"
"""Hash: name in our config (``pack:small``, ``plan:pro``, ``meter:charge``) to Dodo's id."""
INBOX = "fb:inbox"
"""Hash: webhook id to JSON of the delivery and what became of it."""
INBOX_PARKED = "fb:inbox:parked"
"""Sorted set: webhook ids that wait for a replay, by the time of their next try."""
PAYMENTS = "fb:payments"
"""Hash: payment id to JSON of the credit that it buys, fixed when the payment is first seen."""
NOTICES = "fb:{notices}:log"
"""Stream: what the owner should hear of, the newest ten thousand."""
NOTICES_TOLD = "fb:{notices}:told"
"""Sorted set: what was told, by time, so that it is told once."""
NOTICES_SENT = "fb:{notices}:sent"
"""Hash: how far the outgoing webhook has come."""
REFILLS = "fb:refills"
"""Set: tenants that have set up auto-refill."""
EXPORTER = "fb:pump"
"""Hash: the exporter's state for people: last flush, last error, stopped or not."""

CALL_BUDGET = "fb:dodo:budget"
"""Hash: what is left of this minute's calls to Dodo, when it was seen, and the calls a minute."""

PROOF = "fb:proof"
"""Hash: kind of pass over the books to JSON of what the last one found."""

ARCHIVE = "fb:archive"
"""String: the URL under which archived entries lie."""


def api_key(key_hash: str) -> str:
    return f"fb:key:{key_hash}"


def catalog(content_hash: str) -> str:
    return f"fb:catalogue:{content_hash}"


def shard_of(tenant: TenantId) -> int:
    return crc32(tenant.encode()) % SHARDS


@dataclass(frozen=True, slots=True)
class Shard:
    """Keys shared by all tenants of one shard."""

    number: int

    @property
    def tag(self) -> str:
        return f"fb:{{s{self.number:02d}}}"

    @property
    def holds(self) -> str:
        """Hash: request id to the open hold."""
        return f"{self.tag}:holds"

    @property
    def leases(self) -> str:
        """Sorted set: request id by the end of its lease in store milliseconds."""
        return f"{self.tag}:leases"

    @property
    def stream(self) -> str:
        """Stream of entries: usage records, grants, clawbacks, in the order they took effect."""
        return f"{self.tag}:stream"

    @property
    def cursor(self) -> str:
        """Hash: the export cursor and the running sums of what was sealed, acked and dead."""
        return f"{self.tag}:cursor"

    @property
    def archived(self) -> str:
        """Hash: tenant to number and digest of its last archived entry; the archive cursor is in ``cursor``."""
        return f"{self.tag}:archived"

    @property
    def proved(self) -> str:
        """Hash: how far the shard's books were proved, and each tenant's sums until there."""
        return f"{self.tag}:proved"

    @property
    def outbox(self) -> str:
        """Hash: sealed batches that Dodo has not acknowledged, by event id."""
        return f"{self.tag}:outbox"

    @property
    def withheld(self) -> str:
        """Hash: stream id of an entry that is not sealed, since it is not as it was written, to JSON of what it must
        follow."""
        return f"{self.tag}:withheld"

    @property
    def dead(self) -> str:
        """Hash: events that Dodo refused for good, by event id, with the reason."""
        return f"{self.tag}:dead"

    @property
    def unresolved(self) -> str:
        """Hash: request id to JSON of a settle that nobody can be sure about, with the reason."""
        return f"{self.tag}:quarantine"

    @property
    def pulse(self) -> str:
        """String, written so that replicas can be waited for."""
        return f"{self.tag}:pulse"

    @property
    def settled(self) -> tuple[str, ...]:
        """Hashes, one per stretch of time in turn: request ids settled in it, so that a repeat is recognised."""
        return tuple(f"{self.tag}:settled:{turn}" for turn in range(SETTLED_WINDOWS))

    def account(self, tenant: TenantId) -> str:
        """Hash: a tenant's last record number, open holds, exposure settled and held, spend counted under caps, and
        the digests of its last entry (``chain``) and of the last that was sealed (``told``)."""
        return f"{self.tag}:account:{tenant}"

    def buckets(self, tenant: TenantId) -> str:
        """Hash: bucket id to its unit, remaining, held and granted amount, expiry and scope."""
        return f"{self.tag}:buckets:{tenant}"

    def retired(self, tenant: TenantId) -> str:
        """Hash: the same for buckets used up or expired, out of the way of every hold."""
        return f"{self.tag}:retired:{tenant}"

    def limits(self, tenant: TenantId) -> str:
        """Hash: theoretical arrival times in store milliseconds, two per key."""
        return f"{self.tag}:limits:{tenant}"

    def slots(self, tenant: TenantId, key_id: str) -> str:
        """Set: request ids of one key that count as running while their lease lasts."""
        return f"{self.tag}:slots:{tenant}:{key_id}"

    def movement(self, tenant: TenantId, source: str) -> str:
        """Hash: marker of a grant, clawback or repayment, by its business id."""
        return f"{self.tag}:movement:{tenant}:{source}"

    def answer(self, tenant: TenantId, key_hash: str) -> str:
        """Hash: who claimed an idempotency key and for which body, and the answer and record it stands for."""
        return f"{self.tag}:answer:{tenant}:{key_hash}"

    def tenant(self, tenant: TenantId) -> str:
        """String: the tenant as JSON."""
        return f"{self.tag}:tenant:{tenant}"

    def refill(self, tenant: TenantId) -> str:
        """String: the tenant's auto-refill as JSON."""
        return f"{self.tag}:refill:{tenant}"

    def address_sketches(self, tenant: TenantId, key_id: str, hour: int) -> str:
        """HyperLogLog: from how many client addresses a key was used in one hour."""
        return f"{self.tag}:sightings:{tenant}:{key_id}:{hour}"

    def keys_of(self, tenant: TenantId) -> str:
        """Set: hashes of the tenant's API keys."""
        return f"{self.tag}:keys:{tenant}"


def shard_for(tenant: TenantId) -> Shard:
    return Shard(shard_of(tenant))


ALL_SHARDS = tuple(Shard(n) for n in range(SHARDS))
