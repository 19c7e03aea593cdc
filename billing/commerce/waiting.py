"""What everything that applies Dodo's news shares: where the catalog comes from, and how to say "not yet"."""

from collections.abc import Awaitable, Callable

from billing.catalog.catalog import Catalog

CatalogSource = Callable[[], Awaitable[Catalog | None]]


class NotYet(Exception):
    """This cannot be applied now; the message says what is missing. A later try may find it."""
