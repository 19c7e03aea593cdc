-- Give back, once, what one clawback took: a dispute that was won.
-- include: store/numbers store/clock ledger/buckets ledger/waterfall ledger/entries ledger/debts
-- writes: yes
-- keys: account buckets retired stream movements movement clawback
-- args: tenant source undone granted_by content gateway_now:ms ttl:ms
-- reply: done given | repeat given | reused | unknown
-- What the clawback still waited to take is forgotten. Once the bucket owes nothing more, packs that had paid for it
-- get theirs back first.

local before = redis.call("HMGET", keys.movement, "content", "given")
if before[1] then
  if before[1] ~= content then return { "reused" } end
  return { "repeat", before[2] }
end
if redis.call("HEXISTS", keys.clawback, "content") == 0 then return { "unknown" } end
local bucket = redis.call("HGET", keys.clawback, "bucket") or granted_by -- clawbacks of the version before do not say it
local marker = keys.movements .. bucket
local given = number_at(keys.clawback, "taken") + number_at(marker, "took:" .. undone)
local now, buckets, paid = store_ms(), read_buckets(keys), {}
local b = find_bucket(keys, buckets, bucket)
if given > 0 then b.remaining, b.granted, b.is_changed = b.remaining + given, b.granted + given, true end
redis.call("HSET", keys.movement, "content", content, "given", text(given))
redis.call("PEXPIRE", keys.movement, ttl)
redis.call("HDEL", marker, "owed:" .. undone)
if given == 0 then return { "done", "0" } end
give_back(keys, buckets, b, given, paid)
local balance = balance_of(buckets, gateway_now, buckets.allowance)
local clawbacks = take_owed(marker, b, buckets, gateway_now)
for _, payment in ipairs(pay_debts(keys, buckets, gateway_now)) do paid[#paid + 1] = payment end
append_movement(keys, "restore", tenant, { source = source, unit = b.unit, amount = given, bucket = bucket,
  balance = balance, now = now, paid = paid })
append_clawbacks(keys, tenant, clawbacks, now)
write_buckets(keys, buckets)
return { "done", text(given) }
