-- Fill a new bucket once per source. Refunds that came before their payment are taken at once.

local keys = { account = KEYS[1], buckets = KEYS[2], stream = KEYS[3], movement = KEYS[4] }
local tenant, source, unit, amount = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4])
local calendar, marker_ttl_ms, most = tonumber(ARGV[7]), ARGV[8], tonumber(ARGV[9])
local now = store_ms()

local before = redis.call("HGET", keys.movement, "content")
if before then return before == unit .. ARGV[4] and "repeat" or "reused" end
local buckets = read_buckets(keys.buckets)
local total = amount
for _, b in ipairs(buckets) do
  if b.unit == unit then total = total + math.max(0, b.remaining) + b.held end
end
if total > most then return "too_much" end

local new = { id = source, unit = unit, remaining = amount, held = 0, granted = amount, expires = tonumber(ARGV[5]),
  is_allowance = false, adapters = ARGV[6], is_changed = true }
buckets[#buckets + 1] = new
redis.call("HSET", keys.movement, "content", unit .. ARGV[4])
redis.call("PEXPIRE", keys.movement, marker_ttl_ms)
append_movement(keys, "grant", tenant,
  { source = source, unit = unit, amount = amount, bucket = source, balance = balance_of(buckets, calendar), now = now })
take_owed(keys, keys.movement, tenant, new, buckets, calendar, now)
pay_debts(buckets, calendar)
write_changed(keys.buckets, buckets)
return "granted"
