"""What ``farebox status`` shows of billing."""

from cluster.cli.status import billing_lines

PROOF = {"at_ms": 1, "proofs": 9, "faults": 0, "drift_nanos": 0, "named": "", "unproven": ""}
BILLING: dict[str, object] = {
    "money": {
        "open_holds": 3,
        "oldest_hold_s": 12,
        "held_nanos": 150_000,
        "oldest_unsealed_s": 4,
        "backlog_age_s": 61,
    },
    "backlog": 7,
    "dead_events": 1,
    "withheld_records": 8,
    "parked_webhooks": 2,
    "set_aside_webhooks": 3,
    "unsettled_on_this_gateway": 5,
    "quarantined_settles": 6,
    "refused_settles": 4,
}


def test_billing_lines() -> None:
    books = {"store": PROOF, "dodo": PROOF | {"unproven": "no answer"}}
    assert list(billing_lines(BILLING | {"books": books})) == [
        "holds: 3 open with $0.000150, the oldest 12 s",
        "not exported to Dodo: 7, the oldest 61 s",
        "needs attention: 1 dead letters, 8 withheld records, 2 parked webhooks, 3 webhooks set aside, "
        "5 spooled settlements, 6 unresolved settlements, 4 refused settlements",
        "reconciliation (store): no difference",
        "reconciliation (dodo): no answer",
    ]


def test_billing_lines_name_a_difference() -> None:
    wrong = PROOF | {"faults": 2, "drift_nanos": 1, "named": "exposure acme: field overage"}
    assert list(billing_lines(BILLING | {"books": {"store": wrong}}))[-1] == (
        "reconciliation (store): 2 differences: exposure acme: field overage"
    )


def test_billing_lines_before_the_first_reconciliation() -> None:
    assert not [line for line in billing_lines(BILLING) if line.startswith("reconciliation")]
