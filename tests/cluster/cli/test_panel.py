"""What an operator reads: how much is open, what waits, what needs a person, whether the books are right."""

from cluster.cli.panel import money_lines

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
    "unsettled_on_this_gateway": 5,
    "quarantined_settles": 6,
    "refused_settles": 4,
}


def test_the_money_of_a_status_is_said_in_words() -> None:
    books = {"store": PROOF, "dodo": PROOF | {"unproven": "no answer"}}
    assert list(money_lines(BILLING | {"books": books})) == [
        "holds: 3 open with $0.000150, the oldest 12 s",
        "not told to Dodo: 7, the oldest 61 s",
        "needs a look: 1 dead letters, 8 withheld records, 2 parked webhooks, 5 spooled settles, "
        "6 unresolved settles, 4 refused settles",
        "books (store): every proof holds to the nano",
        "books (dodo): no answer",
    ]


def test_drift_is_said_with_what_differs() -> None:
    wrong = PROOF | {"faults": 2, "drift_nanos": 1, "named": "exposure acme: field overage"}
    assert list(money_lines(BILLING | {"books": {"store": wrong}}))[-1] == (
        "books (store): 2 wrong, exposure acme: field overage"
    )


def test_before_anything_was_proved_nothing_is_claimed() -> None:
    assert not [line for line in money_lines(BILLING) if line.startswith("books")]
