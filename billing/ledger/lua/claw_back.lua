-- Take back, once per source, from the bucket that an earlier grant filled; it may go below zero.
-- What is not there to take waits on the grant's marker.

local keys = { account = KEYS[1], buckets = KEYS[2], retired = KEYS[3], stream = KEYS[4], movement = KEYS[5],
  granted = KEYS[6] }
local tenant, source, granted_by, amount = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4])
local calendar, marker_ttl_ms = tonumber(ARGV[5]), ARGV[6]
local now = store_ms()

local before = redis.call("HMGET", keys.movement, "content", "taken")
local content = "c" .. ARGV[4] .. ":" .. granted_by
if before[1] then
  if before[1] ~= content then return "reused" end
  return before[2]
end

local function remember(taken)
  if taken < amount then redis.call("HSET", keys.granted, "owed:" .. source, text(amount - taken)) end
  redis.call("HSET", keys.movement, "content", content, "taken", text(taken))
  redis.call("PEXPIRE", keys.movement, marker_ttl_ms)
  return text(taken)
end

if redis.call("HEXISTS", keys.granted, "content") == 0 then
  local answer = remember(0)
  redis.call("PEXPIRE", keys.granted, marker_ttl_ms)
  return answer
end

local buckets = read_buckets(keys.buckets)
local b = by_id(buckets)[granted_by]
if not b then
  local retired = redis.call("HGET", keys.retired, granted_by)
  if not retired then return "not_a_bucket" end
  b = parse_bucket(granted_by, retired)
  buckets[#buckets + 1] = b
end
local taken = math.min(amount, math.max(0, b.granted))
remember(taken)
redis.call("HDEL", keys.retired, granted_by)
b.remaining, b.granted, b.is_changed = b.remaining - taken, b.granted - taken, true
pay_debts(buckets, calendar)
write_changed(keys.buckets, buckets)
append_movement(keys, "clawback", tenant, { source = source, unit = b.unit, amount = taken, bucket = granted_by,
  balance = balance_of(buckets, calendar), now = now })
return text(taken)
