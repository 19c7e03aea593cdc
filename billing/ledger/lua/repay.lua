-- Lower settled exposure, once per source: the payment that bills it succeeded.
-- include: store/clock ledger/buckets ledger/waterfall ledger/entries
-- writes: yes
-- keys: account buckets stream movement
-- args: tenant source amount:nanos content gateway_now:ms ttl:ms
-- reply: done | repeat | reused

local before = redis.call("HGET", keys.movement, "content")
if before then return { before == content and "repeat" or "reused" } end
local buckets = read_buckets(keys)
local line = by_id(buckets)[LINE]
local paid = math.min(amount, -line.remaining - line.held)
line.remaining, line.is_changed = line.remaining + paid, true
redis.call("HSET", keys.movement, "content", content)
redis.call("PEXPIRE", keys.movement, ttl)
write_buckets(keys, buckets)
append_movement(keys, "repay", tenant, { source = source, unit = "n", amount = paid, bucket = LINE,
  balance = balance_of(buckets, gateway_now, buckets.allowance), now = store_ms() })
return { "done" }
