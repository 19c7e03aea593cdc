"""Why a change that Dodo announces is not applied: ``NotYet``, to be tried again, or ``NotOurs``, which ends it."""

from collections.abc import Collection


class NotYet(Exception):
    """This cannot be applied now; the message says what is missing. A later try may find it."""


class NotOurs(Exception):
    """This is about products of the merchant that are none of ours, so it moves nothing here."""

    def __init__(self, what: str, products: Collection[str]) -> None:
        self.products = tuple(sorted(products))
        super().__init__(f"{what} is for {', '.join(self.products)}, which farebox does not sell")
