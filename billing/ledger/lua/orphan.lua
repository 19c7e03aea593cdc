-- Charge a settle whose hold and marker the store has lost, as if it still had them, or keep it for a person.
-- A request settles after its hold, so while the markers of that time are all remembered, none means never.

local keys = { account = KEYS[1], buckets = KEYS[2], retired = KEYS[3], holds = KEYS[4], stream = KEYS[5],
  quarantine = KEYS[6], settled = { KEYS[7], KEYS[8], KEYS[9], KEYS[10] } }
local id, tenant, status, usage, list = ARGV[1], ARGV[2], ARGV[3], numbers(ARGV[4]), ARGV[5]
local calendar, stretch_ms, head = tonumber(ARGV[6]), tonumber(ARGV[7]), ARGV[8]
local unit, bucket, held, cap = ARGV[9], ARGV[10], tonumber(ARGV[11]), tonumber(ARGV[12])
local held_at, is_sure, settlement = tonumber(ARGV[13]), ARGV[14] == "1", ARGV[15]
local key, packed_caps, month = ARGV[16], ARGV[17], ARGV[18]
local now = store_ms()

local function keep(reason)
  redis.call("HSETNX", keys.quarantine, id, cjson.encode({ at = text(now), reason = reason, settlement = settlement }))
  return { "kept", reason }
end

if redis.call("HEXISTS", keys.holds, id) == 1 or find_marker(keys.settled, id, now, stretch_ms) then
  return { "known" }
end
if not is_sure then
  if redis.call("HEXISTS", keys.quarantine, id) == 1 then return { "kept", "a person decides" } end
  if now - held_at >= STRETCHES_REMEMBERED * stretch_ms then
    return keep("it is too old to be sure that it was never charged")
  end
end

local buckets = read_buckets(keys.buckets)
local first = by_id(buckets)[bucket]
if not first and bucket ~= "" and bucket ~= "overage" then
  local value = redis.call("HGET", keys.retired, bucket)
  if not value then return keep("the credit that it drew on is not there") end
  first = parse_bucket(bucket, value)
  first.was_retired = true
  buckets[#buckets + 1] = first
end
table.sort(buckets, is_drawn_before)

local parts, due, overage = {}, unit == "r" and math.min(1, usage[4]) or math.min(tonumber(list), held), 0
if bucket == "" then due = 0 end
local rest = due
local function take(b, amount)
  b.remaining, b.is_changed, rest = b.remaining - amount, true, rest - amount
  parts[b.id] = (parts[b.id] or 0) + amount
end
if unit == "n" then
  for _, b in ipairs(buckets) do
    if b.unit == "n" and b.remaining > 0 and is_live(b, calendar) then take(b, math.min(b.remaining, rest)) end
  end
  local exposure = cap - number_at(keys.account, "overage") - number_at(keys.account, "overage_held")
  overage = math.max(0, math.min(rest, bucket == "overage" and rest or exposure))
  rest = rest - overage
end
if rest > 0 then take(first, rest) end -- what others have drawn meanwhile is owed

local draws = {}
for _, b in ipairs(buckets) do
  if (parts[b.id] or 0) > 0 then draws[#draws + 1] = { b.id, unit, text(parts[b.id]) } end
end
if overage > 0 then
  draws[#draws + 1] = { "overage", "n", text(overage) }
  redis.call("HSET", keys.account, "overage", text(number_at(keys.account, "overage") + overage))
end
if first and first.was_retired and first.is_changed then redis.call("HDEL", keys.retired, bucket) end
write_changed(keys.buckets, buckets)
local charged = unit == "n" and due or 0
local latest = latest_of(now, calendar)
begin_under(keys.account, key, parse_caps(keys.account, key, packed_caps, latest), 0, charged)
count_spend(keys.account, { month = month }, charged, latest)
local record = record_json({
  record_id = "rec_" .. id, head = head, usage = usage, status = status, now = now, list = list,
  charged = charged, draws = draws, seq = next_seq(keys.account),
  balance = balance_of(buckets, calendar, bucket ~= "" and bucket or nil),
})
mark(keys.settled, id, append(keys, "usage", tenant, record), now, stretch_ms)
redis.call("HDEL", keys.quarantine, id)
return { "settled", record }
