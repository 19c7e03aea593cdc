"""A refund of a fee in a store that the version before wrote takes from the allowance that this one put in place."""

from dataclasses import replace

import pytest

from billing.commerce.inbox import Outcome
from billing.ledger.account import Funding
from billing.pricing.prices import Price
from billing.store.keys import shard_for
from billing.usage import Usage
from tests.support.foreign import receive
from tests.support.purchases import ACME, USD, balance, funding, reconcile, refund
from tests.support.samples import request, settlement
from tests.support.world import World


@pytest.mark.parametrize(("cents", "left"), [(100, 500_000_000), (None, -9 * USD)])
async def test_refund_of_a_fee_whose_allowance_the_version_before_put_in_place(
    world: World, cents: int | None, left: int
) -> None:
    """$9 of $10 are spent; a dollar of the fee of $20 stands for 50 cents of the allowance."""
    await world.tenant("acme")
    fee, price = await world.buy("acme", "plan:pro"), Price.model_validate({"per_request": "9"})
    await receive(world, "subscription.active", {"subscription_id": fee["subscription_id"]})
    now = await funding(world)
    assert now.allowance is not None
    assert now.former_allowance_id is not None
    before = Funding(replace(now.allowance, id=now.former_allowance_id, price=0), now.credit_limit)
    await world.ledger.hold(request(tenant=ACME, price=price, funding=before))
    usage = Usage(prompt_tokens=10, completion_tokens=5)
    await world.ledger.settle(replace(settlement(), tenant=ACME, usage=usage, list_nanos=price.charge(usage)))
    await world.redis.hdel(shard_for(ACME).account(ACME), "allowance")
    done = await receive(world, "refund.succeeded", await refund(world, fee, cents), "msg_2")
    assert (done.outcome, await balance(world)) == (Outcome.APPLIED, left)
    assert (await reconcile(world)).is_clean
