"""The store's schema: every key in it, what the key holds, and the version of these forms.

A tenant's keys lie in one of 64 shards. All keys of a shard carry its hash tag, ``{s07}``, so that one script may touch
them on a cluster too. Amounts are nanos, as decimal text.

Raise ``SCHEMA`` when a stored form changes in a way that another version cannot read or must not write, and add a
step to ``migrations.py``. Entries of the journal are never rewritten: each bears a digest of the one before.
"""

from dataclasses import dataclass
from zlib import crc32

from billing.usage import TenantId

SCHEMA = 2
"""Version of the stored forms: 2 from farebox 0.2 on, 1 before. Stands in ``META`` and in each shard's ``schema``."""

SHARDS = 64
"""Never changes: a tenant's shard is part of each of its keys. Verified at start."""

SETTLED_WINDOWS = 4
"""Hashes of settled request ids. An id is found during its own window and the two after it; the fourth is emptied."""

META = "fb:meta"
"""Hash: ``schema``, the version of the stored forms; ``shards``, their count; ``dodo``, the environment of Dodo whose
ids the store has."""
TENANTS = "fb:tenants"
"""Set: tenant ids."""
CUSTOMERS_WANTED = "fb:customers:wanted"
"""Set: ids of tenants that have no Dodo customer yet."""
CUSTOMER_TENANTS = "fb:customers"
"""Hash: Dodo customer id to tenant id."""
CATALOG_CURRENT = "fb:catalogue:current"
"""String: content hash of the catalog in force."""
CATALOG_HISTORY = "fb:catalogue:history"
"""Stream: content hash of each catalog that came into force, in order, by the store's clock; never trimmed."""
PLANS = "fb:plans"
"""Hash: name of each plan that was ever in force to JSON of its last form."""
GATEWAYS = "fb:gateways"
"""Hash: gateway id to JSON with the content hash of the catalog it serves and the time it last reported."""
LINK_SECRET = "fb:links"
"""String: the secret of the links to checkouts and receipts; the first gateway that needs it makes it."""
DODO_IDS = "fb:dodo:ids"
"""Hash: our name of what we made at Dodo (``pack:small@`` and a hash of its terms, ``meter:charge``) to Dodo's id."""
PRODUCTS = "fb:dodo:products"
"""Hash: Dodo's id of a product to JSON of the terms that it sells, written once."""
INBOX = "fb:inbox"
"""Hash: webhook id to JSON of the delivery and its outcome."""
INBOX_PARKED = "fb:inbox:parked"
"""Sorted set: ids of webhooks that are not finished, by the time of their next try; those set aside have one that
never comes."""
PAYMENTS = "fb:payments"
"""Hash: payment id to JSON of the credit that it buys, fixed when the payment is first seen."""
REFUNDING = "fb:refunding:"
"""String: behind it the id of a payment that a gateway refunds right now; it expires."""
CASH = "fb:{cash}:book"
"""Stream: entries of the cash book as JSON, in the order of booking; never trimmed or changed."""
CASH_BOOKED = "fb:{cash}:booked"
"""Hash: business id of each entry of the cash book to its place in the stream, so that each is booked once."""
NOTICES = "fb:{notices}:log"
"""Stream: the newest ten thousand notices to the owner."""
NOTICES_RECORDED = "fb:{notices}:told"
"""Sorted set: subjects of notices by time, so that each is noticed once."""
NOTICES_SENT = "fb:{notices}:sent"
"""Hash: the last notice that the outgoing webhook delivered."""
REFILLS = "fb:refills"
"""Set: ids of tenants that have set up auto-refill."""
EXPORTER = "fb:pump"
"""Hash: the exporter's state as people see it: last flush, last error, stopped or not."""
CALL_BUDGET = "fb:dodo:budget"
"""Hash: calls to Dodo that are left of this minute, the time of that count, and the calls a minute."""
PROOF = "fb:proof"
"""Hash: kind of reconciliation to JSON of its last result."""
ARCHIVE = "fb:archive"
"""String: URL of the archived entries."""


def api_key(key_hash: str) -> str:
    """String: an API key as JSON, by the SHA-256 of its secret."""
    return f"fb:key:{key_hash}"


def subscription_periods(subscription_id: str) -> str:
    """Hash: beginning of each period of a subscription that was in force here, to the product whose fee pays it."""
    return f"fb:subscription:{subscription_id}:periods"


def catalog(content_hash: str) -> str:
    """String: a published catalog as JSON."""
    return f"fb:catalogue:{content_hash}"


_TAGS = tuple(f"fb:{{s{number:02d}}}" for number in range(SHARDS))


def shard_of(tenant: TenantId) -> int:
    """The number of a tenant's shard."""
    return crc32(tenant.encode()) % SHARDS


@dataclass(frozen=True, slots=True)
class Shard:
    """Keys of one shard."""

    number: int

    @property
    def tag(self) -> str:
        return _TAGS[self.number]

    # Shared by all tenants of the shard.

    @property
    def schema(self) -> str:
        """String: the version of the shard's stored forms. Scripts of another version write nothing to it."""
        return f"{self.tag}:schema"

    @property
    def holds(self) -> str:
        """Hash: request id to its open hold as JSON."""
        return f"{self.tag}:holds"

    @property
    def leases(self) -> str:
        """Sorted set: request id by the end of its lease, in milliseconds of the store's clock."""
        return f"{self.tag}:leases"

    @property
    def settled(self) -> tuple[str, ...]:
        """Hashes, one for each deduplication window in turn: settled request id to its entry id, or to JSON of an
        expired hold."""
        tag = self.tag
        return tuple([f"{tag}:settled:{turn}" for turn in range(SETTLED_WINDOWS)])

    @property
    def unresolved(self) -> str:
        """Hash: request id to JSON of a settlement that only a person can decide about, with the reason."""
        return f"{self.tag}:quarantine"

    @property
    def stream(self) -> str:
        """Stream, the journal: usage records and movements of credit in the order in which they took effect."""
        return f"{self.tag}:stream"

    @property
    def cursor(self) -> str:
        """Hash: how far the journal is sealed and archived; sums of what is sealed, acknowledged and dead."""
        return f"{self.tag}:cursor"

    @property
    def outbox(self) -> str:
        """Hash: event id to JSON of a sealed event that Dodo has not acknowledged."""
        return f"{self.tag}:outbox"

    @property
    def dead(self) -> str:
        """Hash: event id to JSON of a dead letter, an event that Dodo refused for good, with the reason."""
        return f"{self.tag}:dead"

    @property
    def withheld(self) -> str:
        """Hash: id of an entry that was altered, and so is not sealed, to JSON of the entry it must follow."""
        return f"{self.tag}:withheld"

    @property
    def archived(self) -> str:
        """Hash: tenant to number and digest of its last archived entry."""
        return f"{self.tag}:archived"

    @property
    def proved(self) -> str:
        """Hash: how far the shard was reconciled, and each tenant's sums until there."""
        return f"{self.tag}:proved"

    @property
    def pulse(self) -> str:
        """String: written only to wait until replicas have it."""
        return f"{self.tag}:pulse"

    # One tenant's.

    def tenant(self, tenant: TenantId) -> str:
        """String: the tenant as JSON."""
        return f"{self.tag}:tenant:{tenant}"

    def keys_of(self, tenant: TenantId) -> str:
        """Set: hashes of the tenant's API keys."""
        return f"{self.tag}:keys:{tenant}"

    def account(self, tenant: TenantId) -> str:
        """Hash: number and digest (``chain``) of the tenant's last entry, digest of the last sealed (``told``), open
        holds, exposure settled and held, spend under caps and of the month."""
        return f"{self.tag}:account:{tenant}"

    def buckets(self, tenant: TenantId) -> str:
        """Hash: bucket id to unit, remaining, held, granted, expiry, whether it is an allowance, and models."""
        return f"{self.tag}:buckets:{tenant}"

    def retired(self, tenant: TenantId) -> str:
        """Hash: the same of buckets that are used up or ended, so that holds do not read them."""
        return f"{self.tag}:retired:{tenant}"

    def movement(self, tenant: TenantId, source: str) -> str:
        """Hash: marker of a grant, clawback, adjustment or repayment, by its idempotency key; kept for 400 days."""
        return f"{self.tag}:movement:{tenant}:{source}"

    def answer(self, tenant: TenantId, key_hash: str) -> str:
        """Hash: a client's idempotency key: the request that claimed it, its body's digest, the answer, the record."""
        return f"{self.tag}:answer:{tenant}:{key_hash}"

    def limits(self, tenant: TenantId) -> str:
        """Hash: theoretical arrival times of the rate limits, two for each API key, by the store's clock."""
        return f"{self.tag}:limits:{tenant}"

    def slots(self, tenant: TenantId, key_id: str) -> str:
        """Set: request ids of one API key that count as running while their lease lasts."""
        return f"{self.tag}:slots:{tenant}:{key_id}"

    def checkouts(self, tenant: TenantId) -> str:
        """String: how many checkouts links have opened within an hour."""
        return f"{self.tag}:checkouts:{tenant}"

    def refill(self, tenant: TenantId) -> str:
        """String: the tenant's auto-refill as JSON."""
        return f"{self.tag}:refill:{tenant}"

    def address_sketches(self, tenant: TenantId, key_id: str, hour: int) -> str:
        """HyperLogLog: client addresses from which an API key was used in one hour."""
        return f"{self.tag}:sightings:{tenant}:{key_id}:{hour}"


def shard_for(tenant: TenantId) -> Shard:
    return Shard(shard_of(tenant))


ALL_SHARDS = tuple(Shard(n) for n in range(SHARDS))
