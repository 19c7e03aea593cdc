"""A tenant's year against a table worked out by hand: the balance, the gate's answer and Dodo's own figures.

A call costs $0.50. Free gives $2 a month, pro $25 for $20 and at most $10 of overage, team $70 for $50 and at most
$30, a pack $10 for $10 and from December on $15 for $12. Nothing in the table comes from the code that it judges.
"""

from collections import Counter
from pathlib import Path

import pytest

from cluster.demo.year import SCRIPT, Row, run_year

BALANCE, CAP, LAPSED, DEBT = (
    f"InsufficientCredits ({limit})" for limit in ("balance", "overage_cap", "subscription", "debt")
)
NONE = (0, 0, "")

# fmt: off
TABLE = (
    # day, status, (admitted, refused, why), balance, owed, exported to charge, exported as paid, invoiced, refunded
    # $2 are 4 calls.
    ("Jan 01", "", (4, 2, BALANCE), "0.00", "0.00", "0.00", "2.00", "0.00", "0.00"),
    ("Jan 05", "", NONE, "10.00", "0.00", "0.00", "2.00", "10.00", "0.00"),
    # 17 calls are 8.50: 1.50 left, below the threshold of 2, so that a second pack is bought: 1.50 + 10.
    ("Jan 20", "", (17, 0, ""), "11.50", "0.00", "0.00", "10.50", "20.00", "0.00"),
    # 23 calls are 11.50: February's 2.00, then 9.50 of 11.50. 2.00 left ask for a refill, and the card declines.
    ("Feb 03", "", (23, 0, ""), "2.00", "0.00", "0.00", "22.00", "20.00", "0.00"),
    # 2.00 are 4 calls.
    ("Feb 05", "", (4, 2, BALANCE), "0.00", "0.00", "0.00", "24.00", "20.00", "0.00"),
    # 20 for pro; 25 - 10.
    ("Feb 10", "active", (20, 0, ""), "15.00", "0.00", "0.00", "34.00", "40.00", "0.00"),
    # 15 are left and 10 may be owed: 50 calls.
    ("Mar 05", "active", (50, 2, CAP), "0.00", "10.00", "10.00", "49.00", "40.00", "0.00"),
    # 40 + 20 + 10 owed; 25 - 5.
    ("Mar 10", "active", (10, 0, ""), "20.00", "0.00", "10.00", "54.00", "70.00", "0.00"),
    # 44 calls are 22: 20, and 2 owed.
    ("Mar 20", "active", (44, 0, ""), "0.00", "2.00", "12.00", "74.00", "70.00", "0.00"),
    # 15.5 of 31 days are left of pro's 20: team costs 50 - 10 now, and the 2 owed: 70 + 42. All 25 of
    # pro's were spent, of which half had been taken off: team's 70 are less by 12.50. Then 57.50 - 10.
    ("Mar 25", "active", (20, 0, ""), "47.50", "0.00", "12.00", "84.00", "112.00", "0.00"),
    # 125 calls are 62.50: 47.50, and 15 owed.
    ("Apr 20", "active", (125, 0, ""), "0.00", "15.00", "27.00", "131.50", "112.00", "0.00"),
    # 50 + 15 are declined. No new allowance before it is paid: 10 calls on credit.
    ("Apr 25", "past_due", (10, 0, ""), "0.00", "20.00", "32.00", "131.50", "112.00", "0.00"),
    # 3 days of our grace ended on April 28.
    ("Apr 29", "past_due", (0, 2, LAPSED), "0.00", "20.00", "32.00", "131.50", "112.00", "0.00"),
    # 7 days of Dodo's grace end now.
    ("May 02", "on_hold", (0, 2, LAPSED), "0.00", "20.00", "32.00", "131.50", "112.00", "0.00"),
    # 10.5 days after the failure 65 are charged: 112 + 65; 5 of 20 owed are of this period. 70 - 10.
    ("May 06", "active", (20, 0, ""), "60.00", "5.00", "32.00", "141.50", "177.00", "0.00"),
    # 177 + 50 + 5; 70 - 5.
    ("May 25", "active", (10, 0, ""), "65.00", "0.00", "32.00", "146.50", "232.00", "0.00"),
    ("Jun 01", "active", NONE, "75.00", "0.00", "32.00", "146.50", "242.00", "0.00"),
    # $4 of 10 take 4 of 10.
    ("Jun 05", "active", NONE, "71.00", "0.00", "32.00", "146.50", "242.00", "4.00"),
    # January's refill, used up long ago, is disputed: a debt of 10, of which the 6 of June's pack pay 6. An allowance
    # pays no debt, but it lowers what may be drawn: 65 - 4 - 1.
    ("Jun 10", "active", (2, 0, ""), "60.00", "0.00", "32.00", "147.50", "242.00", "4.00"),
    # The dispute is won: the debt is gone, and June's pack has its 6 again.
    ("Jun 12", "active", NONE, "70.00", "0.00", "32.00", "147.50", "242.00", "4.00"),
    # 10 are disputed, but 4 of them were taken back before: 70 - 6.
    ("Jun 14", "active", NONE, "64.00", "0.00", "32.00", "147.50", "242.00", "4.00"),
    # 242 + 50. The 64 were allowance and are gone: 70 - 10.
    ("Jun 25", "active", (20, 0, ""), "60.00", "0.00", "32.00", "157.50", "292.00", "4.00"),
    # 50 calls are 25: 60 - 25.
    ("Jul 08", "active", (50, 0, ""), "35.00", "0.00", "32.00", "182.50", "292.00", "4.00"),
    # 15 of 30 days are left of team's 50: 25, of which pro takes 20 and 5 stay. Half of team's 70 were
    # left as well, so that nothing was overspent. 25 - 5.
    ("Jul 10", "active", (10, 0, ""), "20.00", "0.00", "32.00", "187.50", "292.00", "4.00"),
    # 44 calls are 22: 20, and 2 owed.
    ("Aug 05", "active", (44, 0, ""), "0.00", "2.00", "34.00", "207.50", "292.00", "4.00"),
    # 292 + 20 - 5 + 2; 25 - 5.
    ("Aug 10", "active", (10, 0, ""), "20.00", "0.00", "34.00", "212.50", "309.00", "4.00"),
    # 46 calls are 23: 20, and 3 owed.
    ("Aug 18", "active", (46, 0, ""), "0.00", "3.00", "37.00", "232.50", "309.00", "4.00"),
    # 309 + 3.
    ("Aug 20", "paused", (0, 2, LAPSED), "0.00", "0.00", "37.00", "232.50", "312.00", "4.00"),
    # 312 + 10; 10 - 2.
    ("Aug 25", "paused", (4, 0, ""), "8.00", "0.00", "37.00", "234.50", "322.00", "4.00"),
    # 20 calls are 10: 8, and 2 owed. The period ended on September 10; 31 days of pause make it October 11.
    ("Sep 20", "active", (20, 0, ""), "0.00", "2.00", "39.00", "242.50", "322.00", "4.00"),
    # 322 + 20 + 2; 25 - 5.
    ("Oct 11", "active", (10, 0, ""), "20.00", "0.00", "39.00", "247.50", "344.00", "4.00"),
    # Nothing is owed. 20 of the allowance are left, and cannot be drawn while the subscription is paused.
    ("Nov 01", "paused", (0, 2, LAPSED), "0.00", "0.00", "39.00", "247.50", "344.00", "4.00"),
    # The period and with it the 20 would have ended on November 11; 13 days of pause make it the 24th. 20 - 10.
    ("Nov 14", "active", (20, 0, ""), "10.00", "0.00", "39.00", "257.50", "344.00", "4.00"),
    # 24 calls are 12: 10, and 2 owed.
    ("Nov 16", "active", (24, 0, ""), "0.00", "2.00", "41.00", "267.50", "344.00", "4.00"),
    # The last invoice is the 2 owed. The free plan's November: 4 calls.
    ("Nov 24", "cancelled", (4, 2, BALANCE), "0.00", "0.00", "41.00", "269.50", "346.00", "4.00"),
    # December's 2 of the free plan. The checkout that is open is for 10; from now on the pack costs 12 and brings 15.
    ("Dec 01", "cancelled", NONE, "2.00", "0.00", "41.00", "269.50", "346.00", "4.00"),
    # 346 + 10; 2 + 10.
    ("Dec 02", "cancelled", NONE, "12.00", "0.00", "41.00", "269.50", "356.00", "4.00"),
    # 356 + 12; 12 + 15.
    ("Dec 03", "cancelled", NONE, "27.00", "0.00", "41.00", "269.50", "368.00", "4.00"),
    # Twice 20 for pro, of which one goes back: 368 + 40, 4 + 20. 25 of pro and 25 of packs; 10 calls are 5.
    ("Dec 05", "active", (10, 0, ""), "45.00", "0.00", "41.00", "274.50", "408.00", "24.00"),
    # 15.5 of 31 days are left of pro's 20: team costs 50 - 10 now. Its 70 and the packs' 25; 20 calls are 10. Of pro's
    # 25 more than half were left.
    ("Dec 20", "active", (20, 0, ""), "85.00", "0.00", "41.00", "284.50", "448.00", "24.00"),
    # 24 + 40. All 70 go back, of which 10 were used: the older pack's 10 pay that. 4 calls are 2 of the other 15.
    ("Dec 22", "active", (4, 0, ""), "13.00", "0.00", "41.00", "286.50", "448.00", "64.00"),
    # The other pack's 15 are taken, of which 13 are there.
    ("Dec 26", "active", (0, 2, DEBT), "-2.00", "0.00", "41.00", "286.50", "448.00", "64.00"),
    # 448 + 12; 15 - 2, and 4 calls.
    ("Dec 31", "active", (4, 0, ""), "11.00", "0.00", "41.00", "288.50", "460.00", "64.00"),
)
# fmt: on
NOTICES = {
    # 80 and 100 %: free's January, February and November; team's of March; pro's of February, March, July, August and
    # October
    "allowance.reached": 2 * 9,
    "overage.reached": 2,  # 80 and 100 % of pro's 10 in March
    "refill.succeeded": 1,
    "refill.failed": 1,
    "payment.failed": 1 + 1 + 4,  # the refill, the renewal and the retries before the one that succeeded
    "subscription.past_due": 1,
    "subscription.on_hold": 1,
    "dunning.started": 1,
    "dunning.recovered": 1,
    "refund.succeeded": 3,  # of June's pack, the doubled fee, team's fee
    "dispute.opened": 3,
    "dispute.won": 1,
    "dispute.lost": 2,
    "subscription.doubled": 1,
}


def seen(row: Row) -> tuple[object, ...]:
    gate = (row.admitted, row.refused, row.refusal)
    money = (row.balance, row.exposure, row.exported_charge, row.exported_covered, row.invoiced, row.refunded)
    return (row.day, row.status, gate, *money)


@pytest.mark.timeout(180)
@pytest.mark.slow
async def test_each_step_of_the_year_is_as_worked_out_by_hand(tmp_path: Path) -> None:
    year = await run_year(tmp_path)
    assert [seen(row) for row in year.rows] == list(TABLE)
    assert len(year.rows) == len(SCRIPT)
    assert Counter(year.notices) == NOTICES
    assert year.report.is_clean, (year.report.unproven, year.report.faults)
    assert year.report.drift_nanos == 0
