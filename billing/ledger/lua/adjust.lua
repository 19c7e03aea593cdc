-- Correct what a tenant has, up or down, once per source. A correction is a bucket of its own: below zero it is a
-- debt, which whatever is there pays at once.

local keys = { account = KEYS[1], buckets = KEYS[2], stream = KEYS[3], movement = KEYS[4] }
local tenant, source, unit, amount, reason = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4]), ARGV[5]
local calendar, marker_ttl_ms, most = tonumber(ARGV[6]), ARGV[7], tonumber(ARGV[8])

local before, content = redis.call("HGET", keys.movement, "content"), "a" .. unit .. ARGV[4]
if before then return before == content and "repeat" or "reused" end
local buckets = read_buckets(keys.buckets)
local total = math.abs(amount)
for _, b in ipairs(buckets) do
  if b.unit == unit then total = total + math.abs(b.remaining) + b.held end
end
if total > most then return "too_much" end

buckets[#buckets + 1] = { id = source, unit = unit, remaining = amount, held = 0, granted = amount, expires = 0,
  is_allowance = false, adapters = "", is_changed = true }
redis.call("HSET", keys.movement, "content", content)
redis.call("PEXPIRE", keys.movement, marker_ttl_ms)
append_movement(keys, "adjust", tenant, { source = source, unit = unit, amount = amount, bucket = source,
  balance = balance_of(buckets, calendar), now = store_ms(), reason = reason })
pay_debts(buckets, calendar)
write_changed(keys.buckets, buckets)
return "adjusted"
