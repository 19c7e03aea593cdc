"""The rules of the ledger, one by one, and how the scripts look without each."""

from dataclasses import dataclass

CAPS = "tests/billing/ledger/test_caps.py"
CLOCKS = "tests/billing/ledger/test_wrong_clocks.py"
EXPORT = "tests/billing/export/test_export.py"
WITHHELD = "tests/billing/export/test_withheld.py"
EXPIRY = "tests/billing/ledger/test_expiry.py"
GROWTH = "tests/billing/ledger/test_lost_growth.py"
FORMER = "tests/billing/ledger/test_former_allowance.py"
GRANTS = "tests/billing/ledger/test_grants.py"
LOST = "tests/billing/ledger/test_lost_store.py"
CASH = "tests/billing/reports/test_adds_up.py"
SALES = "tests/billing/ledger/test_sales.py"
STATEMENT = "tests/billing/reports/test_statement.py"
RULES = "tests/billing/ledger/test_ledger_rules.py"


@dataclass(frozen=True)
class Mutant:
    """One rule taken away: ``rule`` stands once in ``file`` and becomes ``instead``."""

    name: str
    file: str
    rule: str
    instead: str = ""
    test: str = ""
    """Whatever kills it; empty is the state machine."""


CONTROL = Mutant("nothing: every rule stands", "hold.lua", "local now = store_ms()", "local now = store_ms()")
"""Survives, or the machine is at fault and no kill means anything."""

MUTANTS: tuple[Mutant, ...] = (
    Mutant("a settled id is not remembered", "settle.lua", "mark(keys.settled, id, bill.entry, now, window)"),
    Mutant(
        "a settled id may be held again",
        "hold.lua",
        'if find_mark(keys.settled, id, now, window) then return { "duplicate" } end',
    ),
    Mutant("an open id is held a second time", "hold.lua", "  if open then", "  if false then"),
    Mutant("the minimum of a hold is not asked for", "hold.lua", "if there.available < min_cost then", "if false then"),
    Mutant(
        "a whole answer is held at once",
        "hold.lua",
        "math.min(initial_hold, there.available, headroom.at_once)",
        "math.min(max_cost, there.available)",
    ),
    Mutant(
        "the allowance in force is not written",
        "hold.lua",
        'if buckets.allowance ~= allowance then redis.call("HSET", keys.account, "allowance", allowance) end',
        test=RULES,
    ),
    Mutant(
        "an allowance ends before its period", "allowance.lua", "if b.expires < given.expires then", "if false then"
    ),
    Mutant(
        "an allowance of the version before is given twice",
        "allowance.lua",
        'live[former] or former ~= "" and find_bucket(keys, buckets, former) or ',
        test=FORMER,
    ),
    Mutant("a call covers any model", "waterfall.lua", 'b.adapters == "" or', "true or"),
    Mutant("a hold counts nothing as held", "waterfall.lua", "b.held + part, true", "b.held, true"),
    Mutant(
        "what is held stays available",
        "waterfall.lua",
        "b.remaining, b.held, b.is_changed = b.remaining - part,",
        "b.remaining, b.held, b.is_changed = b.remaining,",
    ),
    Mutant(
        "a debt does not stop what is postpaid",
        "waterfall.lua",
        "return money < 0 and money or money + math.max(0, credit)",
        "return money + math.max(0, credit)",
    ),
    Mutant(
        "the credit limit is ignored",
        "waterfall.lua",
        "credit, others_credit = policy.limit + b.remaining, held",
        "credit, others_credit = policy.limit, held",
    ),
    Mutant(
        "credit on hold is refused as spent",
        "waterfall.lua",
        'there.potential >= needed and "on_hold" or',
        "false and 0 or",
    ),
    Mutant("own credit counts as others'", "waterfall.lua", " - drawn_from(draws, b.id)", ""),
    Mutant(
        "what pays a debt is drawn",
        "waterfall.lua",
        "policy.keeps_debts and money_in",
        "false and money_in",
        EXPIRY,
    ),
    Mutant("a debt expires", "waterfall.lua", "b.is_line or b.remaining < 0 or policy.own", "b.is_line or policy.own"),
    Mutant(
        "a left plan's allowance is drawn",
        "waterfall.lua",
        "(not b.is_allowance or not policy.allowance or b.id == policy.allowance)",
        "true",
        RULES,
    ),
    Mutant("what a hold drew on may end before it", "waterfall.lua", " or policy.own[b.id] then", " then", RULES),
    Mutant(
        "what others have drawn meanwhile is not owed",
        "waterfall.lua",
        "take(by_id(buckets)[policy.owes], rest, draws)",
        test=LOST,
    ),
    Mutant("the first bucket owes and not the last", "waterfall.lua", "{}, drawn[#drawn]", "{}, drawn[1]", RULES),
    Mutant(
        "parts are charged as they came, not in the buckets' order",
        "waterfall.lua",
        "  for _, b in ipairs(buckets) do\n    if parts[b.id]",
        "  for i = #buckets, 1, -1 do\n    local b = buckets[i]\n    if parts[b.id]",
    ),
    Mutant(
        "an extension is drawn twice",
        "extend.lua",
        'if held >= total then return { "held", text(held) } end',
        "total = total + held",
    ),
    Mutant(
        "an extension is not noted in the hold",
        "extend.lua",
        "hold.draws = merged(buckets, { hold.draws, waterfall(buckets, amount, policy) })",
        "waterfall(buckets, amount, policy)",
    ),
    Mutant("an extension ignores its least", "extend.lua", "held + there.available < least", "false"),
    Mutant(
        "an extension draws what is not there",
        "extend.lua",
        "math.min(total - held, there.available, headroom.at_once)",
        "total - held",
        CAPS,
    ),
    Mutant(
        "an extension draws on the allowance of its hold",
        "extend.lua",
        "buckets.allowance or hold.allowance",
        "hold.allowance",
        RULES,
    ),
    Mutant("a charge may exceed the hold", "bill.lua", "part = math.min(amount, due_nanos)", "part = due_nanos"),
    Mutant("the rest is not given back", "bill.lua", "b.remaining + amount - part", "b.remaining"),
    Mutant("a hold leaks when it ends", "bill.lua", "b.held - amount,", "b.held - part,"),
    Mutant("the rest goes back to another bucket", "bill.lua", "known[draw[1]], nil", "known[draws[1][1]], nil"),
    Mutant(
        "settled exposure is forgotten",
        "buckets.lua",
        '"overage", text(-b.remaining - b.held)',
        '"overage", "0"',
    ),
    Mutant(
        "growth that a store lost is not charged",
        "bill.lua",
        "if held == 0 or lost <= 0 then",
        "if true then",
        GROWTH,
    ),
    Mutant(
        "a settle leaves a debt to the next payment",
        "bill.lua",
        "  pay_debts(keys, buckets, outcome.gateway_now)\n",
        "",
        RULES,
    ),
    Mutant(
        "an ended lease bills all that is held", "expire.lua", "list = tonumber(hold.list), status", "list = 60, status"
    ),
    Mutant("the end of a lease is not looked at", "expire.lua", "or tonumber(ends) > now then", "then"),
    Mutant("an expired hold is not remembered", "expire.lua", "mark(keys.settled, id, cjson", "text(0, id, cjson"),
    Mutant("an ended lease forgets lost growth", "expire.lua", 'tonumber(hold.grown or "0")', "0", RULES),
    Mutant(
        "a checkpoint does not say what is held",
        "checkpoint.lua",
        "request.held > nanos_of(hold.draws)",
        "false",
        RULES,
    ),
    Mutant(
        "a late settle may exceed the hold",
        "settle.lua",
        "due = math.min(list, math.max(tonumber(expired.held), held))",
        "due = list",
    ),
    Mutant(
        "a late settle bills the checkpoint again", "settle.lua", "due - tonumber(expired.charged))", "due)", EXPIRY
    ),
    Mutant(
        "a late settle draws any allowance",
        "settle.lua",
        "buckets.allowance or expired.allowance",
        "nil",
        RULES,
    ),
    Mutant(
        "a late checkpoint takes progress back",
        "checkpoint.lua",
        "request.list >= tonumber(hold.list)",
        "true",
        EXPIRY,
    ),
    Mutant("credit never expires", "buckets.lua", "b.expires == 0 or b.expires > gateway_now", "true"),
    Mutant(
        "credit that ends first is drawn last",
        "buckets.lua",
        "return a.expires < b.expires",
        "return a.expires > b.expires",
    ),
    Mutant(
        "an allowance is drawn last", "buckets.lua", "then return a.is_allowance end", "then return b.is_allowance end"
    ),
    Mutant("no debt is paid", "debts.lua", "local part = math.min(b.remaining, owed)", "local part = 0"),
    Mutant("an allowance pays a debt", "debts.lua", "part > 0 and not b.is_allowance and", "part > 0 and"),
    Mutant("what is held counts as a debt", "debts.lua", "-(debt.remaining + debt.held)", "-debt.remaining"),
    Mutant(
        "credit that comes back stays where a debt was paid",
        "debts.lua",
        'local part = math.min(number_at(marker, "paid:" .. to.id), amount, math.max(0, b.remaining))',
        "local part = 0",
        RULES,
    ),
    Mutant("giving back leaves a debt", "debts.lua", ", amount, math.max(0, b.remaining))", ", amount)", RULES),
    Mutant(
        "a payment of a debt comes back twice",
        "debts.lua",
        'redis.call("HINCRBY", marker, "paid:" .. to.id, text(-part))',
        test=GRANTS,
    ),
    Mutant(
        "a draw does not say what its credit was sold for",
        "bill.lua",
        "text(part), b.price, b.sold }",
        'text(part), "" }',
    ),
    Mutant(
        "a refund changes what the rest was sold for",
        "buckets.lua",
        '"|" .. b.price .. "|" .. b.sold or',
        '"|" .. b.price .. "|" .. text(b.granted) or',
        SALES,
    ),
    Mutant(
        "what a grant was sold for is forgotten", "grant.lua", "price = price, sold = text(amount)", 'price = ""', SALES
    ),
    Mutant(
        "a grant's entry does not say what it was sold for", "entries.lua", 'm.price and m.price ~= ""', "nil", SALES
    ),
    Mutant(
        "what an allowance was sold for is forgotten",
        "ledger/codec.py",
        "(bucket.price, bucket.sold or bucket.granted) if bucket.price else ()",
        "()",
        SALES,
    ),
    Mutant(
        "a payment is booked each time it comes", "book.lua", "== 1 then return 0 end", "== 2 then return 0 end", CASH
    ),
    Mutant(
        "a draw is not taken off what is owed",
        "reports/statement.py",
        'self._count(at_ms, "expired" if bucket.is_over else "deferred", -earned)',
        "",
        STATEMENT,
    ),
    Mutant("what expires stays owed", "reports/statement.py", 'self._count(at_ms, "deferred", -nanos)', "", STATEMENT),
    Mutant(
        "a fee that comes late changes a month before",
        "reports/statement.py",
        "max(fee.period_end_ms, at_ms)",
        "fee.period_end_ms",
        STATEMENT,
    ),
    Mutant(
        "an old record is worth what is sold now",
        "catalog/publication.py",
        "max(0, bisect_right(self.starts_ms, at_ms) - 1)",
        "-1",
        "tests/billing/reports/test_report.py",
    ),
    Mutant("records are not numbered", "entries.lua", '"seq", seq, "chain"', '"seq", "1", "chain"'),
    Mutant("a payment grants each time it comes", "grant.lua", "if before then return", "if false then return"),
    Mutant(
        "a refund before its payment is lost",
        "grant.lua",
        "local clawbacks = take_owed(keys.movement, new, buckets, gateway_now)",
        "local clawbacks = {}",
    ),
    Mutant(
        "a refund takes more than was granted", "claw_back.lua", "math.min(amount, math.max(0, b.granted))", "amount"
    ),
    Mutant("a refund takes each time it comes", "claw_back.lua", "if before[1] then", "if false then"),
    Mutant(
        "what a refund found taken already is forgotten", "claw_back.lua", "if taken < amount then", "if false then"
    ),
    Mutant("a won dispute gives back each time it comes", "restore.lua", "if before[1] then", "if false then"),
    Mutant("a won dispute stays owed", "restore.lua", 'redis.call("HDEL", marker, "owed:" .. undone)'),
    Mutant(
        "a refund misses the allowance of the version before",
        "claw_back.lua",
        "put_allowance(keys, buckets, granted_by, allowance_value, former_allowance)",
        'put_allowance(keys, buckets, granted_by, allowance_value, "")',
        FORMER,
    ),
    Mutant(
        "a won dispute misses the allowance of the version before",
        "restore.lua",
        'redis.call("HGET", keys.clawback, "bucket") or granted_by',
        "granted_by",
        FORMER,
    ),
    Mutant("an invoice is repaid each time it comes", "repay.lua", "if before then return", "if false then return"),
    Mutant(
        "a lost hold is charged though it is too old",
        "recover.lua",
        "if now - held_at >= WINDOWS_REMEMBERED * window then",
        "if false then",
        LOST,
    ),
    Mutant(
        "a lost hold that is known is charged",
        "recover.lua",
        'redis.call("HEXISTS", keys.holds, id) == 1 or find_mark(keys.settled, id, now, window)',
        "false",
        LOST,
    ),
    Mutant("credit that is not there is asked for in vain", "recover.lua", "if due > 0 then", "if true then", RULES),
    Mutant("a reason that is gone keeps a settle unresolved", "recover.lua", ".reason ~= NOT_THERE", "", RULES),
    Mutant(
        "a lost allowance is not put in place",
        "recover.lua",
        'if bucket == allowance then put_allowance(keys, buckets, allowance, allowance_value, "") end',
        test=RULES,
    ),
    Mutant(
        "a lost hold counts in a window that began later", "recover.lua", "cap[2] == text(caps[i].start)", "true", RULES
    ),
    Mutant(
        "a hold that cannot be ended keeps the others",
        "ledger/ledger.py",
        "except ResponseError as error:",
        "except ZeroDivisionError as error:",
        RULES,
    ),
    Mutant(
        "a debt is refused as a credit limit", "ledger/codec.py", 'if balance < 0:\n        return "debt"', "", RULES
    ),
    Mutant(
        "max_tokens is not clamped",
        "ledger/codec.py",
        '_tokens_paid(request, reply.number("affords"))',
        "request.max_tokens",
    ),
    Mutant("an answer of no token is let in", "ledger/codec.py", "min(1, request.max_tokens)", "0"),
    Mutant("a lost lease is not reported", "ledger/ledger.py", "gone |= {RequestId", "gone | {RequestId"),
    Mutant("a repeat is answered as new", "ledger/ledger.py", 'return reply.state != "repeat"', "return True"),
    Mutant("a key's cap is not looked at", "hold.lua", "if headroom.at_once < min_cost then", "if false then", CAPS),
    Mutant(
        "what is held counts under no cap",
        "hold.lua",
        "begin_under(keys.account, key, in_force, nanos_of(draws), 0)",
        test=CAPS,
    ),
    Mutant(
        "a hold grows beyond its key's cap",
        "extend.lua",
        "there.available, headroom.at_once)",
        "there.available)",
        CAPS,
    ),
    Mutant("what a cap held never comes back", "bill.lua", "-held, bill.charged", "0, bill.charged", CAPS),
    Mutant(
        "a late settle counts under no cap", "settle.lua", "count_under(keys.account, expired", "text(0, expired", CAPS
    ),
    Mutant(
        "a cap outlives its window",
        "caps.lua",
        "if spend.start ~= tonumber(cap[2]) then spend = { spent = 0, held = 0 } end",
        "",
        CAPS,
    ),
    Mutant("a wrong clock is let in", "hold.lua", "if may_differ > 0 and", "if false and", CLOCKS),
    Mutant("a window ahead of every clock stays", "caps.lua", "if known > latest then known = 0 end", "", CLOCKS),
    Mutant("a month ahead of every clock stays", "bill.lua", "if counted > latest then counted = 0 end", "", CLOCKS),
    Mutant("a month ahead of every clock begins late", "bill.lua", " or month > latest", "", CLOCKS),
    Mutant("a batch is sealed without a compare", "seal.lua", "~= expected", "== 'never'", EXPORT),
    Mutant(
        "a seal forgets what it has reached",
        "seal.lua",
        'redis.call("HSET", account, "told", reached[i])',
        "",
        WITHHELD,
    ),
    Mutant(
        "a withheld record is forgotten",
        "seal.lua",
        'redis.call("HSET", keys.withheld, one.id, one.entry)',
        "",
        WITHHELD,
    ),
    Mutant("a withheld record is sealed twice", "release.lua", "entry) == 0 then", "entry) == 2 then", WITHHELD),
    Mutant("an acknowledgement counts twice", "ack.lua", "== 1 then", ">= 0 then", EXPORT),
)
