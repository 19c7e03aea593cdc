-- Lower settled exposure once per source, when the payment that bills it succeeded.

local keys = { account = KEYS[1], buckets = KEYS[2], stream = KEYS[3], movement = KEYS[4] }
local tenant, source, nanos, calendar, marker_ttl_ms = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4]), ARGV[5]

local before = redis.call("HGET", keys.movement, "content")
if before then return before == "o" .. nanos and "repeat" or "reused" end
local overage = number_at(keys.account, "overage")
local paid = math.min(tonumber(nanos), overage)
redis.call("HSET", keys.movement, "content", "o" .. nanos)
redis.call("PEXPIRE", keys.movement, marker_ttl_ms)
redis.call("HSET", keys.account, "overage", text(overage - paid))
append_movement(keys, "repay", tenant, { source = source, unit = "n", amount = paid, bucket = "overage",
  balance = balance_of(read_buckets(keys.buckets), calendar), now = store_ms() })
return "repaid"
