"""The rules of selling, one by one, and how the code looks without each: terms, payments, plans, cash, export, keys."""

from tests.billing.ledger.mutant_rules import Mutant

REFILLS = "tests/billing/commerce/test_auto_refill.py"
DOUBLES = "tests/billing/commerce/test_doubles.py"
FEES = "tests/billing/commerce/test_fees.py"
FOREIGN = "tests/billing/commerce/test_foreign.py"
NEWCOMERS = "tests/billing/commerce/test_newcomers.py"
CHANGES = "tests/billing/commerce/test_plan_changes.py"
WATCH = "tests/billing/commerce/test_price_watch.py"
STORY = "tests/test_commerce_story.py"
SYNC = "tests/billing/commerce/test_sync.py"
TERMS = "tests/billing/commerce/test_terms.py"
BUDGET = "tests/billing/dodo/test_call_budget.py"
STATE = "tests/billing/export/test_export_state.py"
REFUSED = "tests/billing/export/test_refused_customers.py"
CASH = "tests/billing/reports/test_adds_up.py"
SCOPES = "tests/billing/tenants/test_scopes.py"
KEYS = "tests/deployments/gateway/api/test_keys_api.py"
PAGES = "tests/deployments/gateway/api/test_pages.py"
THROTTLED = "tests/deployments/gateway/api/test_scopes.py"

MUTANTS: tuple[Mutant, ...] = (
    Mutant(
        "the terms of a product are overwritten",
        "commerce/products.py",
        '"HSETNX", PRODUCTS',
        '"HSET", PRODUCTS',
        f"{TERMS}::test_terms_of_a_product_are_written_once",
    ),
    Mutant(
        "other grants have an equal key",
        "catalog/terms.py",
        "model_dump_json(exclude_defaults=True)",
        'model_dump_json(include={"name", "price"})',
        f"{SYNC}::test_changed_grant_is_a_new_product",
    ),
    Mutant(
        "a payment grants by the catalog in force",
        "commerce/payments.py",
        "sold = await self._products.terms(product_id)\n",
        "sold = await self._products.terms(product_id)\n"
        "            now = await self._subscriptions._catalog()\n"
        "            if sold and now and sold.plain_name in now.packs:\n"
        "                sold = Terms.of_pack(sold.plain_name, now.packs[sold.plain_name])\n",
        f"{TERMS}::test_webhook_after_a_price_change_grants_the_old_terms",
    ),
    Mutant(
        "a subscription brings the allowance of its plan as it is now",
        "ledger/admission.py",
        "plan.allowance if subscription.sold is None else subscription.sold.grants",
        "plan.allowance",
        f"{TERMS}::test_subscriber_keeps_the_allowance_that_was_sold",
    ),
    Mutant(
        "a price changed at Dodo is found as fit",
        "commerce/sync.py",
        '("price", _price(self.cents, "USD"), _price(product.cents, product.currency)),',
        "",
        f"{SYNC}::test_price_changed_at_dodo_is_a_new_product",
    ),
    Mutant(
        "a price in another currency is found as fit",
        "commerce/sync.py",
        'if currency == "USD" else',
        "if True else",
        f"{SYNC}::test_price_changed_at_dodo_is_a_new_product",
    ),
    Mutant(
        "a product that differs is noticed as missing as well",
        "commerce/price_watch.py",
        "if name not in differing:",
        "if True:",
        f"{WATCH}::test_changed_price_at_dodo_is_noticed_once",
    ),
    Mutant(
        "a second subscription is not ended",
        "commerce/subscriptions.py",
        "if found.is_running and other is not None and",
        "if False and other is not None and",
        f"{DOUBLES}::test_double_click_leaves_one_subscription",
    ),
    Mutant(
        "the first subscription is ended in place of the second",
        "commerce/subscriptions.py",
        "await self._doubles.end(second, first.id, tenant)",
        "await self._doubles.end(await self._dodo.retrieve_subscription(first.id), second.id, tenant)",
        f"{DOUBLES}::test_double_click_leaves_one_subscription",
    ),
    Mutant(
        "a second subscription is ended while the first one's payment is late",
        "commerce/subscriptions.py",
        "if first_now.status is not SubscriptionStatus.ACTIVE:",
        "if False:",
        f"{DOUBLES}::test_waiting_subscription_counts_at_once_when_the_first_ends",
    ),
    Mutant(
        "a refund is made without a claim",
        "commerce/doubles.py",
        "        await self._claim(payment.id)\n",
        "",
        f"{DOUBLES}::test_part_of_a_payment_is_refunded_once_by_two_gateways",
    ),
    Mutant(
        "a refund made by another process is not looked for",
        "commerce/doubles.py",
        "        if reason in payment.refunds:\n            made = payment.refunds[reason]\n        elif",
        "        if",
        f"{DOUBLES}::test_part_of_a_payment_is_refunded_once_by_two_gateways",
    ),
    Mutant(
        "a pack is refunded with the second subscription",
        "commerce/doubles.py",
        "if is_usage_doubled and _pays_only(payment, double)",
        "if is_usage_doubled",
        f"{DOUBLES}::test_pack_bought_together_with_a_second_subscription_is_kept",
    ),
    Mutant(
        "a period that was served is refunded",
        "commerce/doubles.py",
        "if not reaches:",
        "if False:",
        f"{DOUBLES}::test_replaced_subscription_that_comes_back_is_ended",
    ),
    Mutant(
        "usage that a second subscription invoiced is repaid",
        "commerce/payments.py",
        "if payment.includes_usage and not await self._subscriptions.is_given_back(payment, subscription_id):",
        "if payment.includes_usage:",
        f"{DOUBLES}::test_subscription_that_renewed_unnoticed_is_refunded_with_its_usage",
    ),
    Mutant(
        "usage that only one subscription invoiced is refunded",
        "commerce/doubles.py",
        "is_usage_doubled = not payment.includes_usage or starts_ms >= since_ms",
        "is_usage_doubled = True",
        f"{DOUBLES}::test_late_renewal_beside_a_newer_subscription_pays_its_usage",
    ),
    Mutant(
        "our refund of a fee takes from a pack of the same cart",
        "commerce/payments.py",
        "if fee_of := subscription_in(reason):",
        'if fee_of := "":',
        f"{DOUBLES}::test_pack_bought_together_with_a_second_subscription_is_kept",
    ),
    Mutant(
        "a fee heard of late buys the plan of now",
        "commerce/payments.py",
        "await self._products.terms(product_id or found.product_id)",
        "await self._products.terms(found.product_id)",
        f"{CHANGES}::test_fee_heard_of_after_a_change_bought_the_allowance_of_its_own_plan",
    ),
    Mutant(
        "a refunded fee takes nothing back",
        "commerce/payments.py",
        "if allowance := await self._allowance(payment, subscription_id):",
        "if allowance := None:",
        f"{FEES}::test_what_was_spent_of_a_refunded_allowance_is_a_debt",
    ),
    Mutant(
        "a refunded fee pauses no credit",
        "commerce/payments.py",
        'if payment.refund_status == "full" or refund.amount in (None, payment.total_amount):',
        "if False:",
        f"{FEES}::test_refunded_fee_ends_its_credit_at_once",
    ),
    Mutant(
        "refunds that add up to a fee pause no credit",
        "commerce/payments.py",
        'payment.refund_status == "full" or',
        "",
        f"{FEES}::test_partial_refunds_that_add_up_end_the_credit",
    ),
    Mutant(
        "a part of a fee that is refunded pauses credit",
        "commerce/payments.py",
        'if payment.refund_status == "full" or refund.amount in (None, payment.total_amount):',
        "if True:",
        f"{FEES}::test_partial_refund_takes_its_share",
    ),
    Mutant(
        "a dispute that was won goes on pausing credit",
        "commerce/payments.py",
        "OVER if is_settled_for_us else period_ms",
        "period_ms",
        f"{FEES}::test_disputed_fee_pauses_its_credit",
    ),
    Mutant(
        "a dispute that was won gives nothing back",
        "commerce/payments.py",
        "await self._ledger.restore(clawback)",
        "pass",
        f"{FEES}::test_won_dispute_gives_back_to_the_pack_that_had_paid",
    ),
    Mutant(
        "an upgrade takes nothing of what was overspent",
        "commerce/subscriptions.py",
        "await self._take_what_was_overspent(before, found, sold, catalog)",
        "pass",
        f"{CHANGES}::test_upgrade_takes_what_was_overspent_from_the_new_allowance",
    ),
    Mutant(
        "an upgrade takes what was left of the old allowance as well",
        "commerce/subscriptions.py",
        "max(0, share - max(0, account.allowance.remaining))",
        "share",
        STORY,
    ),
    Mutant(
        "what the new allowance does not cover is forgotten",
        "commerce/subscriptions.py",
        "await self._take_once(source, before, old, over)",
        "pass",
        f"{CHANGES}::test_overspent_allowance_that_the_new_plan_does_not_cover_is_a_debt",
    ),
    Mutant(
        "a cheaper plan counts at once",
        "commerce/plan_changes.py",
        "return self.terms.price < self.current.price",
        "return False",
        f"{CHANGES}::test_downgrade_counts_from_the_next_period",
    ),
    Mutant(
        "a scheduled change is not taken back",
        "commerce/plan_changes.py",
        "await self._dodo.keep_plan(target.found.id)",
        "pass",
        f"{CHANGES}::test_scheduled_change_is_taken_back_by_asking_for_the_plan_of_now",
    ),
    Mutant(
        "a set-aside payment is retried",
        "commerce/inbox.py",
        "NEVER_MS if delivery.outcome is Outcome.SET_ASIDE else None",
        "0 if delivery.outcome is Outcome.SET_ASIDE else None",
        f"{FOREIGN}::test_foreign_payment_is_set_aside_once",
    ),
    Mutant(
        "a mixed cart is set aside whole",
        "commerce/payments.py",
        "if foreign and foreign == products:",
        "if foreign:",
        f"{FOREIGN}::test_mixed_cart_grants_what_is_ours",
    ),
    Mutant(
        "a payment ahead of our own sync is set aside",
        "commerce/foreign.py",
        "if tag := await dodo.product_tag(product):",
        'if tag := "":',
        f"{FOREIGN}::test_payment_ahead_of_our_own_sync_waits",
    ),
    Mutant(
        "a booked payment is granted as a sale as well",
        "commerce/payments.py",
        "if known and known[0].tenant:  # a person has booked it",
        "if False:",
        f"{FOREIGN}::test_booked_payment_is_granted_once",
    ),
    Mutant(
        "a payment that buys something is booked over",
        "commerce/decisions.py",
        "if fixed != (wanted,):",
        "if False:",
        f"{FOREIGN}::test_payment_that_buys_something_is_not_booked_over",
    ),
    Mutant(
        "a refund before its payment is booked never counts",
        "commerce/decisions.py",
        "await self._inbox.reschedule(await self._reversals_of(payment.id), self._clock())",
        "pass",
        f"{FOREIGN}::test_refund_of_a_booked_payment_claws_back",
    ),
    Mutant(
        "a dropped delivery comes back",
        "keep_delivery.lua",
        "if outcome == one then",
        "if outcome then",
        f"{FOREIGN}::test_dropped_delivery_stays_dropped",
    ),
    Mutant(
        "a sign-up does not complete a half-made tenant",
        "tenants/directory.py",
        "return await self._find(tenant_id) if tenant_id else None",
        "return await self.get(tenant_id) if tenant_id else None",
        f"{NEWCOMERS}::test_newcomer_killed_anywhere_is_completed",
    ),
    Mutant(
        "a half-made tenant is completed under another id",
        "tenants/directory.py",
        'tenant.model_copy(update={"id": begun})',
        "tenant",
        f"{NEWCOMERS}::test_newcomer_that_was_begun_under_another_id_keeps_that",
    ),
    Mutant(
        "auto-refill charges other terms than those agreed to",
        "commerce/auto_refill/refiller.py",
        'if await self._agreed(refill) not in ("", terms.key):',
        "if False:",
        f"{REFILLS}::test_pack_on_other_terms_is_not_charged",
    ),
    Mutant(
        "the refusal of one customer stops the export",
        "export/sending.py",
        "if in_a_row == MAX_REFUSED or self._is_refused(waiting[0].tenant):\n"
        "                        if not await self._takes_others(tally):",
        "if True:\n                        if True:",
        f"{REFUSED}::test_refused_customer_keeps_no_other_from_being_exported",
    ),
    Mutant(
        "a wrong key makes dead letters",
        "export/sending.py",
        "POISON = (400, 413, 422)",
        "POISON = (400, 401, 403, 404, 413, 422)",
        f"{REFUSED}::test_refusal_of_everything_stops_without_dead_letters_and_few_calls",
    ),
    Mutant(
        "a key that ends in mid-send makes dead letters",
        "export/sending.py",
        "except DodoRefused:\n                    return False",
        "except DodoRefused:\n                    pass",
        f"{REFUSED}::test_key_that_ends_in_mid_send_makes_no_dead_letters",
    ),
    Mutant(
        "the export has no calls of its own",
        "spend_call.lua",
        "if level >= 0 or reserved_share == 0 then return 0 end",
        "if true then return 0 end",
        f"{BUDGET}::test_reserved_share_is_left_while_page_calls_overdraw_the_budget",
    ),
    Mutant(
        "the export's own calls come on top of all others",
        "spend_call.lua",
        "if level >= 0 or reserved_share == 0",
        "if reserved_share == 0",
        f"{BUDGET}::test_reserved_share_adds_nothing_to_a_budget_that_nobody_overdraws",
    ),
    Mutant(
        "a flush that leaves a shard behind is a success",
        "export/exporter.py",
        "if tally.sent and not self._failing:",
        "if tally.sent:",
        f"{STATE}::test_flush_that_leaves_a_shard_behind_is_no_success",
    ),
    Mutant(
        "a key with a spend cap may charge the card",
        "tenants/tenant.py",
        "if scope in key.scopes and key.has_spend_cap:",
        "if False:",
        f"{SCOPES}::test_scope_refused_where_bounds_would_be_worthless",
    ),
    Mutant(
        "a rotated key may do what the old one may not",
        "tenants/tenant.py",
        '"shown", "created_at_ms", "made_by")}',
        '"shown", "created_at_ms", "made_by", "scopes")}',
        f"{SCOPES}::test_rotated_key_keeps_its_scopes",
    ),
    Mutant(
        "a key makes one that may do more",
        "tenants/tenant.py",
        "if scope not in maker.scopes:",
        "if False:",
        f"{KEYS}::test_key_has_no_scope_that_its_maker_lacks",
    ),
    Mutant(
        "a throttled key may charge the card",
        "tenants/tenant.py",
        "SUSPENDED_BY_THROTTLE = (Scope.KEYS_WRITE, *BILLING)",
        "SUSPENDED_BY_THROTTLE = (Scope.KEYS_WRITE,)",
        f"{THROTTLED}::test_throttle_suspends_billing_until_lifted",
    ),
    Mutant(
        "what a webhook booked is booked from Dodo's ledger again",
        "commerce/cash.py",
        "if line.kind in _FROM_WEBHOOKS:",
        "if False:",
        f"{CASH}::test_cash_earned_and_deferred_add_up_to_what_dodo_paid_out",
    ),
    Mutant(
        "a cash entry takes Dodo's time",
        "commerce/cash.py",
        '"booked_at_ms": booked_at_ms}',
        '"booked_at_ms": raw["at_ms"]}',
        f"{CASH}::test_payment_whose_webhook_comes_late_stands_where_it_was_booked",
    ),
    Mutant(
        "a link never ends",
        "commerce/links.py",
        "fernet.decrypt_at_time(_padded(token), LIFETIME_S, self._clock() // 1000)",
        "fernet.decrypt(_padded(token))",
        f"{PAGES}::test_link_expires_and_cannot_be_altered",
    ),
    Mutant(
        "a link that another leads to lives longer",
        "commerce/links.py",
        "fernet.extract_timestamp(_padded(token))",
        "self._clock() // 1000",
        f"{PAGES}::test_declined_retry_link_lives_no_longer_than_its_receipt",
    ),
    Mutant(
        "a link for something else is not told apart",
        "commerce/links.py",
        'fields.pop("kind") != kind.__name__',
        'not fields.pop("kind")',
        f"{PAGES}::test_link_does_nothing_else",
    ),
    Mutant(
        "links open checkouts without end",
        "commerce/links.py",
        "if int(count) > CHECKOUTS_PER_HOUR:",
        "if False:",
        f"{PAGES}::test_checkouts_from_links_are_bounded_per_tenant",
    ),
)
