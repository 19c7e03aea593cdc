-- Give back, once, what one clawback took: a dispute that was won. What it still waited to take is forgotten.

local keys = { account = KEYS[1], buckets = KEYS[2], retired = KEYS[3], stream = KEYS[4], movement = KEYS[5],
  clawback = KEYS[6], granted = KEYS[7] }
local tenant, source, undone, granted_by = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local calendar, marker_ttl_ms = tonumber(ARGV[5]), ARGV[6]

local before = redis.call("HMGET", keys.movement, "content", "given")
local content = "u" .. undone
if before[1] then return before[1] == content and before[2] or "reused" end
if redis.call("HEXISTS", keys.clawback, "content") == 0 then return "unknown" end
local given = number_at(keys.clawback, "taken") + number_at(keys.granted, "took:" .. undone)

local buckets, b = read_buckets(keys.buckets), nil
if given > 0 then
  b = by_id(buckets)[granted_by]
  if not b then
    b = parse_bucket(granted_by, redis.call("HGET", keys.retired, granted_by))
    buckets[#buckets + 1] = b
  end
end
redis.call("HSET", keys.movement, "content", content, "given", text(given))
redis.call("PEXPIRE", keys.movement, marker_ttl_ms)
redis.call("HDEL", keys.granted, "owed:" .. undone)
if given == 0 then return "0" end
redis.call("HDEL", keys.retired, granted_by)
b.remaining, b.granted, b.is_changed = b.remaining + given, b.granted + given, true
local now = store_ms()
append_movement(keys, "restore", tenant, { source = source, unit = b.unit, amount = given, bucket = granted_by,
  balance = balance_of(buckets, calendar), now = now })
take_owed(keys, keys.granted, tenant, b, buckets, calendar, now)
pay_debts(buckets, calendar)
write_changed(keys.buckets, buckets)
return text(given)
