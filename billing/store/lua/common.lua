-- What every script shares: numbers, buckets, stream entries and markers of settled requests.
-- Amounts travel and rest as decimal strings: Lua writes large numbers as 1e+15 and keeps 53 bits.

local STRETCHES_REMEMBERED = 2
local CLOCK_SLACK_MS = 300000

local function text(number)
  if number == 0 then return "0" end -- never "-0"
  return string.format("%.0f", number)
end

local function store_ms()
  local time = redis.call("TIME")
  return tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
end

-- What begins later than this lies ahead of every clock: one that ran ahead and was put right has left it behind.
local function latest_of(now, calendar)
  return math.max(now, calendar) + CLOCK_SLACK_MS
end

-- A bucket is unit|remaining|held|granted|expires|is_allowance|adapters; unit is n or r, expires 0 is never.
local function parse_bucket(id, value)
  local unit, remaining, held, granted, expires, allowance, adapters =
    string.match(value, "^([nr])|(-?%d+)|(%d+)|(-?%d+)|(%d+)|([01])|(.*)$")
  return {
    id = id, unit = unit, remaining = tonumber(remaining), held = tonumber(held), granted = tonumber(granted),
    expires = tonumber(expires), is_allowance = allowance == "1", adapters = adapters,
  }
end

local function format_bucket(b)
  return table.concat({
    b.unit, text(b.remaining), text(b.held), text(b.granted), text(b.expires), b.is_allowance and "1" or "0", b.adapters,
  }, "|")
end

-- Allowance first, then by earliest expiry, those without expiry last.
local function is_drawn_before(a, b)
  if a.is_allowance ~= b.is_allowance then return a.is_allowance end
  if a.expires ~= b.expires then
    if a.expires == 0 or b.expires == 0 then return b.expires == 0 end
    return a.expires < b.expires
  end
  return a.id < b.id
end

local function read_buckets(key)
  local flat, buckets = redis.call("HGETALL", key), {}
  for i = 1, #flat, 2 do buckets[#buckets + 1] = parse_bucket(flat[i], flat[i + 1]) end
  return buckets
end

local function write_bucket(key, b)
  redis.call("HSET", key, b.id, format_bucket(b))
end

-- A debt does not expire.
local function is_live(b, calendar)
  return b.expires == 0 or b.expires > calendar or b.remaining < 0
end

-- Money that may be drawn beside one allowance, that of the plan; of all there are where none is named.
local function balance_of(buckets, calendar, allowance_id)
  local sum = 0
  for _, b in ipairs(buckets) do
    local is_drawn = not b.is_allowance or not allowance_id or b.id == allowance_id
    if b.unit == "n" and is_drawn and is_live(b, calendar) then sum = sum + b.remaining end
  end
  return sum
end

local function by_id(buckets)
  local found = {}
  for _, b in ipairs(buckets) do found[b.id] = b end
  return found
end

-- What is left pays what is owed, within one unit and scope, so that a debt outlives no credit.
local function pay_debts(buckets, calendar)
  table.sort(buckets, is_drawn_before)
  for _, debt in ipairs(buckets) do
    for _, b in ipairs(buckets) do
      if debt.remaining < 0 and b.remaining > 0 and b.unit == debt.unit and b.adapters == debt.adapters
        and is_live(b, calendar) then
        local paid = math.min(b.remaining, -debt.remaining)
        b.remaining, debt.remaining = b.remaining - paid, debt.remaining + paid
        b.is_changed, debt.is_changed = true, true
      end
    end
  end
end

local function write_changed(key, buckets)
  for _, b in ipairs(buckets) do
    if b.is_changed then write_bucket(key, b) end
  end
end

local function number_at(key, field)
  return tonumber(redis.call("HGET", key, field) or "0")
end

local function next_seq(account)
  local seq = text(number_at(account, "seq") + 1)
  redis.call("HSET", account, "seq", seq)
  return seq
end

-- Each entry carries a digest of itself and of the tenant's entry before it: no entry is altered unseen.
local function append(keys, kind, tenant, payload)
  local before = redis.call("HGET", keys.account, "chain") or ""
  local chain = string.sub(redis.sha1hex(before .. kind .. payload), 1, 16)
  redis.call("HSET", keys.account, "chain", chain)
  return redis.call("XADD", keys.stream, "*", "k", kind, "t", tenant, "p", payload, "c", chain)
end

local function append_movement(keys, kind, tenant, m)
  local payload = '{"source":' .. cjson.encode(m.source) .. ',"unit":"' .. (m.unit == "r" and "requests" or "nanos")
    .. '","amount":' .. text(m.amount) .. ',"bucket":' .. cjson.encode(m.bucket) .. ',"seq":' .. next_seq(keys.account)
    .. ',"balance_nanos":' .. text(m.balance) .. ',"occurred_at_ms":' .. text(m.now)
    .. (m.reason and ',"reason":' .. cjson.encode(m.reason) or "") .. "}"
  append(keys, kind, tenant, payload)
end

-- What refunds and disputes could not take from a grant, because it had not come or others had it, waits on the
-- grant's marker and is taken as soon as it is there: together they take what it gave, in any order.
local function take_owed(keys, marker, tenant, b, buckets, calendar, now)
  local owed = redis.call("HGETALL", marker)
  for i = 1, #owed, 2 do
    local source = string.match(owed[i], "^owed:(.*)$")
    local taken = source and math.min(tonumber(owed[i + 1]), b.granted) or 0
    if taken > 0 then
      b.remaining, b.granted = b.remaining - taken, b.granted - taken
      redis.call("HSET", marker, "owed:" .. source, text(tonumber(owed[i + 1]) - taken),
        "took:" .. source, text(number_at(marker, "took:" .. source) + taken))
      append_movement(keys, "clawback", tenant, { source = source, unit = b.unit, amount = taken, bucket = b.id,
        balance = balance_of(buckets, calendar), now = now })
    end
  end
end

-- Markers lie in one hash per stretch of time, four hashes in turn. A marker is found during its own
-- stretch and the two after it, and outlives them by a tenth of a stretch. After a failover the clock may have
-- gone back: a marker of the stretch to come counts as well.
local function marker_key(ring, stretch)
  return ring[stretch % #ring + 1]
end

local function find_marker(ring, id, now, stretch_ms)
  local stretch = math.floor(now / stretch_ms)
  for back = -1, STRETCHES_REMEMBERED do
    local key = marker_key(ring, stretch - back)
    local value = redis.call("HGET", key, id)
    if value then return value, key end
  end
  return nil
end

local function mark(ring, id, value, now, stretch_ms)
  local stretch = math.floor(now / stretch_ms)
  local key = marker_key(ring, stretch)
  redis.call("HSET", key, id, value)
  redis.call("PEXPIREAT", key, text(math.floor((stretch + STRETCHES_REMEMBERED + 1.1) * stretch_ms)))
end
