"""The scope that each route of the API asks of its caller's key, in one table."""

from collections.abc import Mapping

from billing.tenants.tenant import Scope

SCOPES: Mapping[tuple[str, str], Scope] = {
    ("POST", "/v1/chat/completions"): Scope.INFERENCE,
    ("POST", "/v1/completions"): Scope.INFERENCE,
    ("POST", "/v1/quote"): Scope.INFERENCE,
    ("GET", "/v1/models"): Scope.INFERENCE,
    ("GET", "/v1/models/{model_id}"): Scope.INFERENCE,
    # A throttled key reads here why it is, and every receipt shows the balance: no right to billing is asked for.
    ("GET", "/v1/account"): Scope.USAGE_READ,
    ("GET", "/v1/usage"): Scope.USAGE_READ,
    ("GET", "/v1/usage/records"): Scope.USAGE_READ,
    ("GET", "/v1/offers"): Scope.USAGE_READ,
    ("GET", "/v1/keys"): Scope.KEYS_WRITE,
    ("POST", "/v1/keys"): Scope.KEYS_WRITE,
    ("DELETE", "/v1/keys/{key_id}"): Scope.KEYS_WRITE,
    ("POST", "/v1/keys/{key_id}/rotate"): Scope.KEYS_WRITE,
    ("GET", "/v1/invoices"): Scope.BILLING_READ,
    ("GET", "/v1/account/auto-refill"): Scope.BILLING_READ,
    ("PUT", "/v1/account/auto-refill"): Scope.BILLING_WRITE,
    ("DELETE", "/v1/account/auto-refill"): Scope.BILLING_WRITE,
    ("POST", "/v1/checkout"): Scope.BILLING_WRITE,
    ("POST", "/v1/portal"): Scope.BILLING_WRITE,
}
"""By method and path, as the OpenAPI document writes them. A route that authenticates its caller must be here."""
