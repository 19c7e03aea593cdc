-- Take back, once per source, from the bucket that an earlier grant filled; it may go below zero.
-- include: store/numbers store/clock ledger/buckets ledger/waterfall ledger/allowance ledger/entries ledger/debts
-- writes: yes
-- keys: account buckets retired stream movements movement
-- args: tenant source granted_by allowance_value former_allowance amount:count content gateway_now:ms ttl:ms
-- reply: done taken | repeat taken | reused | not_a_bucket
-- What is not there to take waits on the grant's marker. `allowance_value`: where `granted_by` is an allowance, the bucket
-- as a hold would put it in place; "" for a grant. No movement fills an allowance, so its marker is made here. What is taken
-- from the allowance that the version before named otherwise is noted under that name.

local before = redis.call("HMGET", keys.movement, "content", "taken")
if before[1] then
  if before[1] ~= content then return { "reused" } end
  return { "repeat", before[2] }
end

local buckets, bucket = read_buckets(keys), granted_by
if allowance_value ~= "" then
  bucket = put_allowance(keys, buckets, granted_by, allowance_value, former_allowance)
end
local marker = keys.movements .. bucket

local function remember(taken)
  if taken < amount then redis.call("HSET", marker, "owed:" .. source, text(amount - taken)) end
  redis.call("HSET", keys.movement, "content", content, "taken", text(taken), "bucket", bucket)
  redis.call("PEXPIRE", keys.movement, ttl)
  return { "done", text(taken) }
end

if allowance_value ~= "" then
  redis.call("HSET", marker, "content", "allowance")
  redis.call("PEXPIRE", marker, ttl)
elseif redis.call("HEXISTS", marker, "content") == 0 then
  local reply = remember(0)
  redis.call("PEXPIRE", marker, ttl)
  return reply
end

local b = find_bucket(keys, buckets, bucket)
if not b then return { "not_a_bucket" } end
local taken = math.min(amount, math.max(0, b.granted))
b.remaining, b.granted, b.is_changed = b.remaining - taken, b.granted - taken, true
local payments = pay_debts(keys, buckets, gateway_now)
write_buckets(keys, buckets)
append_movement(keys, "clawback", tenant, { source = source, unit = b.unit, amount = taken, bucket = bucket,
  balance = balance_of(buckets, gateway_now, buckets.allowance), now = store_ms(), paid = payments })
return remember(taken)
