"""Notices an owner of products at Dodo that are not as they were made, and of what is on sale and missing there.

A merchant can change a price in Dodo's dashboard: from then on its buyers pay that, for what the product's terms grant.
"""

from billing.commerce.context import Commerce
from billing.commerce.sync import plan
from billing.notices.log import Notices
from billing.notices.notice import Notice, NoticeKind
from billing.usage import TenantId

REMEDY = "`farebox dodo sync` makes a new product in its place"


async def compare_products(commerce: Commerce) -> int:
    """Compare what the catalog in force sells with what Dodo has. How many notices were new.

    Raises:
        DodoUnavailable, DodoRefused: Dodo could not say.
    """
    catalog = await commerce.catalog()
    if catalog is None:
        return 0
    found, now, notices = await plan(commerce.dodo, commerce.redis, catalog), commerce.clock(), Notices(commerce.redis)
    differing = {one.name for one in found.drift}
    recorded = 0
    for one in found.drift:
        facts = {"product": one.name, "what": one.what, "configured": one.ours, "at_dodo": one.theirs, "remedy": REMEDY}
        once = f"product:{one.name}:{one.what}:{one.ours}:{one.theirs}"
        recorded += await notices.record(Notice(NoticeKind.PRODUCT_DIFFERS, TenantId(""), once, now, facts))
    for name in found.created:
        if name not in differing:
            once = f"product:{name}:missing:{catalog.content_hash}"
            facts = {"product": name, "remedy": "`farebox dodo sync` creates it: until then it cannot be bought"}
            recorded += await notices.record(Notice(NoticeKind.PRODUCT_MISSING, TenantId(""), once, now, facts))
    return recorded
