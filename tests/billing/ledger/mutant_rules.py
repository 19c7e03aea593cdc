"""The rules of the ledger, one by one, and how the scripts look without each."""

from dataclasses import dataclass

CAPS = "tests/billing/ledger/test_caps.py"
CLOCKS = "tests/billing/ledger/test_wrong_clocks.py"
EXPORT = "tests/billing/export/test_export.py"
WITHHELD = "tests/billing/export/test_withheld.py"
GROWTH = "tests/billing/ledger/test_lost_growth.py"


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
    Mutant("a settled id is not remembered", "settle.lua", "mark(keys.settled, id, bill.entry, now, stretch_ms)"),
    Mutant(
        "a settled id may be held again",
        "hold.lua",
        'if find_marker(keys.settled, id, now, stretch_ms) then return { "duplicate" } end',
    ),
    Mutant("an open id is held a second time", "hold.lua", "  if open then", "  if false then"),
    Mutant("a hold counts nothing as held", "draw.lua", "b.held + part, true", "b.held, true"),
    Mutant(
        "what is held stays available",
        "draw.lua",
        "b.remaining, b.held, b.is_changed = b.remaining - part,",
        "b.remaining, b.held, b.is_changed = b.remaining,",
    ),
    Mutant(
        "a debt does not stop what is postpaid",
        "draw.lua",
        "return money < 0 and money or money + credit",
        "return money + credit",
    ),
    Mutant("the cap on exposure is ignored", "draw.lua", "math.max(0, cap - overage_held)", "math.max(0, cap)"),
    Mutant(
        "credit on hold is told as spent", "draw.lua", 'purse.potential >= needed and "on_hold" or', "false and 0 or"
    ),
    Mutant("own credit counts as others'", "draw.lua", " - (mine[b.id] or 0)", ""),
    Mutant("the least of a hold is not asked for", "hold.lua", "if purse.available < least then", "if false then"),
    Mutant("an allowance ends before its period", "hold.lua", "if b.expires < given.expires then", "if false then"),
    Mutant("a call covers any model", "hold.lua", 'b.adapters == "" or', "true or"),
    Mutant(
        "a whole answer is held at once",
        "hold.lua",
        "draw_money(purse, math.min(first, purse.available, room.at_once))",
        "draw_money(purse, math.min(worst, purse.available))",
    ),
    Mutant(
        "an extension is drawn twice",
        "extend.lua",
        'if held >= total then return { "held", text(held) } end',
        "total = total + held",
    ),
    Mutant("an extension is not noted in the hold", "extend.lua", "hold.draws = merged()"),
    Mutant(
        "an extension's exposure is not counted", "extend.lua", "purse.overage_held + overage", "purse.overage_held"
    ),
    Mutant("an extension ignores its least", "extend.lua", "held + purse.available < least", "false"),
    Mutant(
        "an extension draws what is not there",
        "extend.lua",
        "math.min(total - held, purse.available, room.at_once)",
        "total - held",
    ),
    Mutant(
        "parts are charged as they came, not in the buckets' order",
        "extend.lua",
        "  for _, b in ipairs(buckets) do\n    if parts[b.id]",
        "  for i = #buckets, 1, -1 do\n    local b = buckets[i]\n    if parts[b.id]",
    ),
    Mutant("a charge may exceed the hold", "close.lua", "part = math.min(amount, due_nanos)", "part = due_nanos"),
    Mutant("the rest is not given back", "close.lua", "b.remaining + amount - part", "b.remaining"),
    Mutant("a hold leaks when it ends", "close.lua", "b.held - amount,", "b.held - part,"),
    Mutant("the rest goes back to another bucket", "close.lua", "known[draw[1]], nil", "known[hold.draws[1][1]], nil"),
    Mutant("settled exposure is forgotten", "close.lua", "+ bill.overage)", "+ 0)"),
    Mutant("an ended lease bills all that is held", "expire.lua", "list = hold.list, status", 'list = "60", status'),
    Mutant("the end of a lease is not looked at", "expire.lua", "or tonumber(ends) > now then", "then"),
    Mutant("an expired hold is not remembered", "expire.lua", "mark(keys.settled, id,", "text(0, id,"),
    Mutant(
        "a late settle may exceed the hold",
        "settle.lua",
        "math.min(tonumber(list), tonumber(expired.held))",
        "tonumber(list)",
    ),
    Mutant("a late settle bills the checkpoint again", "settle.lua", " - tonumber(expired.charged)\n  if", "\n  if"),
    Mutant(
        "a late settle takes what pays a debt",
        "settle.lua",
        "local room = balance_of(buckets, calendar)",
        "local room = 1000",
    ),
    Mutant("growth that a store lost is not charged", "settle.lua", "  regrow(hold)\n", "", GROWTH),
    Mutant("a late checkpoint takes progress back", "checkpoint.lua", "tonumber(list) >= tonumber(hold.list)", "true"),
    Mutant("credit never expires", "common.lua", "b.expires == 0 or b.expires > calendar or b.remaining < 0", "true"),
    Mutant(
        "credit that ends first is drawn last",
        "common.lua",
        "return a.expires < b.expires",
        "return a.expires > b.expires",
    ),
    Mutant(
        "an allowance is drawn last", "common.lua", "then return a.is_allowance end", "then return b.is_allowance end"
    ),
    Mutant("no debt is paid", "common.lua", "math.min(b.remaining, -debt.remaining)", "0"),
    Mutant("records are not numbered", "common.lua", 'redis.call("HSET", account, "seq", seq)'),
    Mutant("a payment grants each time it comes", "grant.lua", "if before then return", "if false then return"),
    Mutant(
        "a refund before its payment is lost",
        "grant.lua",
        "take_owed(keys, keys.movement, tenant, new, buckets, calendar, now)",
    ),
    Mutant(
        "a refund takes more than was granted", "claw_back.lua", "math.min(amount, math.max(0, b.granted))", "amount"
    ),
    Mutant("a refund takes each time it comes", "claw_back.lua", "if before[1] then", "if false then"),
    Mutant(
        "what a refund found taken already is forgotten", "claw_back.lua", "if taken < amount then", "if false then"
    ),
    Mutant(
        "a won dispute gives back each time it is told",
        "restore.lua",
        "if before[1] then return",
        "if false then return",
    ),
    Mutant("a won dispute stays owed", "restore.lua", 'redis.call("HDEL", keys.granted, "owed:" .. undone)'),
    Mutant("a correction counts each time it comes", "adjust.lua", "if before then return", "if false then return"),
    Mutant("an invoice is repaid each time it comes", "repay.lua", "if before then return", "if false then return"),
    Mutant("max_tokens is not clamped", "ledger/codec.py", "_tokens_paid(request, int(affords))", "request.max_tokens"),
    Mutant("an answer of no token is let in", "ledger/codec.py", "min(1, request.max_tokens)", "0"),
    Mutant("a lost lease is not told", "ledger/ledger.py", "            gone |= set(await", "            set(await"),
    Mutant(
        "a repeat is told as new", "ledger/ledger.py", "return str(reply)", 'return str(reply).replace("repeat", "")'
    ),
    Mutant("a key's cap is not looked at", "hold.lua", "if room.at_once < least then", "if false then", CAPS),
    Mutant(
        "what is held counts under no cap",
        "hold.lua",
        "begin_under(keys.account, key_id, caps, nanos_of(draws), 0)",
        test=CAPS,
    ),
    Mutant(
        "a hold grows beyond its key's cap", "extend.lua", "purse.available, room.at_once)", "purse.available)", CAPS
    ),
    Mutant("what a cap held never comes back", "close.lua", "-bill.held, bill.charged", "0, bill.charged", CAPS),
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
    Mutant("a wrong clock is let in", "hold.lua", "if may_differ_ms > 0 and", "if false and", CLOCKS),
    Mutant("a window ahead of every clock stays", "caps.lua", "if known > latest then known = 0 end", "", CLOCKS),
    Mutant("a month ahead of every clock stays", "close.lua", "if counted > latest then counted = 0 end", "", CLOCKS),
    Mutant("a month ahead of every clock begins late", "close.lua", " or month > latest", "", CLOCKS),
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
