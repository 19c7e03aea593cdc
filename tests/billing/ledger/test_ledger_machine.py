"""The ledger beside its model: random movements, failures and lost stores."""

import pytest

from cluster import valkey
from tests.support.ledger_machine import drive, relax


@pytest.mark.slow
def test_ledger_agrees_with_model(server: valkey.Valkey) -> None:
    relax(server.url)
    try:
        drive(server.url, examples=200, steps=40)
    finally:
        relax(server.url, "always")
