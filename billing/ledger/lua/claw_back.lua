-- Take back, once per source, from the bucket that an earlier grant filled; it may go below zero.
-- include: store/numbers store/clock ledger/buckets ledger/waterfall ledger/entries ledger/debts
-- writes: yes
-- keys: account buckets retired stream movements movement granted
-- args: tenant source granted_by allowance_value amount:count content gateway_now:ms ttl:ms
-- reply: done taken | repeat taken | reused | not_a_bucket
-- What is not there to take waits on the grant's marker. `allowance_value`: where `granted_by` is an allowance, the bucket
-- as a hold would put it in place; "" for a grant. No movement fills an allowance, so its marker is made here.

local before = redis.call("HMGET", keys.movement, "content", "taken")
if before[1] then
  if before[1] ~= content then return { "reused" } end
  return { "repeat", before[2] }
end

local function remember(taken)
  if taken < amount then redis.call("HSET", keys.granted, "owed:" .. source, text(amount - taken)) end
  redis.call("HSET", keys.movement, "content", content, "taken", text(taken))
  redis.call("PEXPIRE", keys.movement, ttl)
  return { "done", text(taken) }
end

local buckets = read_buckets(keys)
if allowance_value ~= "" then
  if not find_bucket(keys, buckets, granted_by) then
    add_bucket(buckets, parse_bucket(granted_by, allowance_value)).is_changed = true
  end
  redis.call("HSET", keys.granted, "content", "allowance")
  redis.call("PEXPIRE", keys.granted, ttl)
elseif redis.call("HEXISTS", keys.granted, "content") == 0 then
  local reply = remember(0)
  redis.call("PEXPIRE", keys.granted, ttl)
  return reply
end

local b = find_bucket(keys, buckets, granted_by)
if not b then return { "not_a_bucket" } end
local taken = math.min(amount, math.max(0, b.granted))
b.remaining, b.granted, b.is_changed = b.remaining - taken, b.granted - taken, true
local payments = pay_debts(keys, buckets, gateway_now)
write_buckets(keys, buckets)
append_movement(keys, "clawback", tenant, { source = source, unit = b.unit, amount = taken, bucket = granted_by,
  balance = balance_of(buckets, gateway_now, buckets.allowance), now = store_ms(), paid = payments })
return remember(taken)
