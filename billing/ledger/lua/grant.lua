-- Fill one new bucket, once per source: a grant, or an operator's correction, which may be below zero.
-- include: store/numbers store/clock ledger/buckets ledger/waterfall ledger/entries ledger/debts
-- writes: yes
-- keys: account buckets stream movements movement
-- args: kind tenant source unit amount:count expires:ms adapters price reason content gateway_now:ms ttl:ms most:nanos
-- reply: done | repeat | reused | too_much
-- Refunds that came before their payment are taken at once, and debts are paid. `content` tells a repeat from another
-- movement of the same source; `kind` is that of the entry; `price` is what the amount was sold for, "" for a gift.

local before = redis.call("HGET", keys.movement, "content")
if before then return { before == content and "repeat" or "reused" } end
local now, buckets = store_ms(), read_buckets(keys)
local total = math.abs(amount)
for _, b in ipairs(buckets) do
  if b.unit == unit and not b.is_line then total = total + math.abs(b.remaining) + b.held end
end
if total > most then return { "too_much" } end

local new = add_bucket(buckets, { id = source, unit = unit, remaining = amount, held = 0, granted = amount,
  expires = expires, is_allowance = false, adapters = adapters, price = price, sold = text(amount), is_changed = true })
redis.call("HSET", keys.movement, "content", content)
redis.call("PEXPIRE", keys.movement, ttl)
local balance = balance_of(buckets, gateway_now, buckets.allowance)
local clawbacks = take_owed(keys.movement, new, buckets, gateway_now)
append_movement(keys, kind, tenant, { source = source, unit = unit, amount = amount, bucket = source, balance = balance,
  now = now, price = price, expires = expires, reason = reason ~= "" and reason or nil, paid = pay_debts(keys, buckets, gateway_now) })
append_clawbacks(keys, tenant, clawbacks, now)
write_buckets(keys, buckets)
return { "done" }
