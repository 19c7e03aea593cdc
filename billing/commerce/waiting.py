"""What everything that applies Dodo's news shares: where the catalogue comes from, and how to say "not yet"."""

from collections.abc import Awaitable, Callable

from billing.catalog.catalog import Catalogue

CatalogueSource = Callable[[], Awaitable[Catalogue | None]]


class NotYet(Exception):
    """This cannot be applied now; the message says what is missing. A later try may find it."""
