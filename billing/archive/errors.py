"""Failures of the archive."""

from billing.errors import BillingError


class ArchiveUnavailable(BillingError):
    """The archive's files cannot be written or read."""
