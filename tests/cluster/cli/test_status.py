"""What ``farebox status`` shows of billing."""

import pytest

from cluster.cli.status import billing_lines, span

NOW = 1_796_025_884_975
SENT = {"state": "running", "last_flush_ms": NOW - 1_000, "last_success_ms": NOW - 12_000}

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
    "unreadable_settles": 9,
}


def test_billing_lines() -> None:
    books = {"store": PROOF, "dodo": PROOF | {"unproven": "no answer"}}
    assert list(billing_lines(BILLING | {"books": books}, NOW)) == [
        "holds: 3 open with $0.000150, the oldest 12 s",
        "not exported to Dodo: 7, the oldest 1 min 1 s",
        "needs attention: 1 dead letters, 8 withheld records, 2 parked webhooks, 3 webhooks set aside, "
        "5 spooled settlements, 6 unresolved settlements, 4 refused settlements, 9 unreadable settlements",
        "reconciliation (store): no difference",
        "reconciliation (dodo): no answer",
    ]


def test_billing_lines_name_a_difference() -> None:
    wrong = PROOF | {"faults": 2, "drift_nanos": 1, "named": "exposure acme: field overage"}
    assert list(billing_lines(BILLING | {"books": {"store": wrong}}, NOW))[-1] == (
        "reconciliation (store): 2 differences: exposure acme: field overage"
    )


def test_billing_lines_before_the_first_reconciliation() -> None:
    assert not [line for line in billing_lines(BILLING, NOW) if line.startswith("reconciliation")]


@pytest.mark.parametrize(
    ("pump", "line"),
    [
        ({"state": "starting", "last_flush_ms": 0}, "starting"),
        ({"state": "running", "last_flush_ms": NOW}, "running, nothing exported yet, nothing waits"),
        (SENT, "running, last success 12 s ago, nothing waits"),
        (
            SENT | {"waiting_events": 3, "held_events": 2, "last_flush_ms": NOW - 600_000},
            "running, last success 12 s ago, 3 events wait, 2 events wait for their tenant's Dodo customer, "
            "last run 10 min ago",
        ),
        (
            SENT
            | {"state": "backing_off", "failures": 4, "next_try_ms": NOW + 20_000, "waiting_events": 1, "error": "503"},
            "Dodo does not take what is sent, last success 12 s ago, 1 events wait, "
            "4 failures in a row, next try in 20 s: 503",
        ),
        (
            SENT | {"state": "starved", "waiting_events": 1, "error": "no call was left"},
            "STARVED of calls to Dodo, last success 12 s ago, 1 events wait: no call was left",
        ),
    ],
)
def test_export_is_told_in_words_and_times(pump: dict[str, object], line: str) -> None:
    assert next(billing_lines({"pump": pump}, NOW)) == f"export: {line}"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-1, "0 s"), (0, "0 s"), (59, "59 s"), (60, "1 min"), (3_661, "1 h 1 min"), (190_000, "2 d 4 h")],
)
def test_span_is_shown_in_its_two_largest_units(seconds: int, text: str) -> None:
    assert span(seconds) == text
