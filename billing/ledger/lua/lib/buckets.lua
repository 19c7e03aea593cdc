-- A tenant's buckets, in the order in which they are drawn, and the credit line as the last of them.
-- include: store/numbers
--
-- At rest a bucket is unit|remaining|held|granted|expires|is_allowance|adapters, and |price|sold behind them where it was
-- sold. Its unit is n (nanos) or r (requests); `remaining` is what may be drawn, `held` what open holds drew; it expires at
-- so many milliseconds, 0 for never; the models that a bucket of requests covers are separated by commas, none for all.
-- `sold` units cost `price` nanos. Refunds lower `granted` and neither of the two, so that their ratio stays. Both are text:
-- a product of a price and an amount has more digits than Lua's numbers, so nothing is reckoned with them here.
-- The credit line at rest is two numbers of the account: exposure that is settled and exposure that is held. In a script it
-- is a bucket whose `remaining` is below zero by both. How far below it may go is not kept: each hold brings its limit.

local LINE = "overage" -- its name in every usage record: entries are never rewritten

local function parse_bucket(id, value)
  local unit, remaining, held, granted, expires, allowance, adapters, price, sold =
    string.match(value, "^([nr])|(-?%d+)|(%d+)|(-?%d+)|(%d+)|([01])|([^|]*)|?(%d*)|?(%d*)$")
  return {
    id = id, unit = unit, remaining = tonumber(remaining), held = tonumber(held), granted = tonumber(granted),
    expires = tonumber(expires), is_allowance = allowance == "1", adapters = adapters, price = price, sold = sold,
  }
end

local function format_bucket(b)
  local sale = b.price ~= "" and "|" .. b.price .. "|" .. b.sold or ""
  return table.concat({
    b.unit, text(b.remaining), text(b.held), text(b.granted), text(b.expires), b.is_allowance and "1" or "0", b.adapters,
  }, "|") .. sale
end

-- Allowances first, then what expires first, what never expires behind that, and the credit line last.
local function is_drawn_before(a, b)
  if a.is_line ~= b.is_line then return b.is_line end
  if a.is_allowance ~= b.is_allowance then return a.is_allowance end
  if a.expires ~= b.expires then
    if a.expires == 0 or b.expires == 0 then return b.expires == 0 end
    return a.expires < b.expires
  end
  return a.id < b.id
end

local function is_live(b, gateway_now)
  return b.expires == 0 or b.expires > gateway_now
end

-- All buckets that are not retired. Their field `allowance` is the allowance in force, which is that of the last hold: ""
-- is none, and where no hold has named it yet it is nil and any allowance counts.
local function read_buckets(keys)
  local flat, buckets = redis.call("HGETALL", keys.buckets), {}
  for i = 1, #flat, 2 do buckets[#buckets + 1] = parse_bucket(flat[i], flat[i + 1]) end
  local account = redis.call("HMGET", keys.account, "overage", "overage_held", "allowance")
  if #buckets > 1 then table.sort(buckets, is_drawn_before) end
  local settled, held = tonumber(account[1] or "0"), tonumber(account[2] or "0")
  buckets[#buckets + 1] = { id = LINE, unit = "n", remaining = -(settled + held), held = held, expires = 0,
    is_allowance = false, is_line = true, price = "" }
  buckets.allowance = account[3] or nil
  return buckets
end

local function add_bucket(buckets, b)
  buckets[#buckets + 1] = b
  table.sort(buckets, is_drawn_before)
  return b
end

local function by_id(buckets)
  local found = {}
  for _, b in ipairs(buckets) do found[b.id] = b end
  return found
end

-- One bucket, also a retired one; nil where there is none.
local function find_bucket(keys, buckets, id)
  local b = by_id(buckets)[id]
  if b then return b end
  local retired = redis.call("HGET", keys.retired, id)
  if not retired then return nil end
  b = parse_bucket(id, retired)
  b.was_retired = true
  return add_bucket(buckets, b)
end

-- Write what has changed. A bucket that is done is put out of the way of every hold.
local function write_buckets(keys, buckets)
  for _, b in ipairs(buckets) do
    if b.is_line and b.is_changed then
      redis.call("HSET", keys.account, "overage", text(-b.remaining - b.held), "overage_held", text(b.held))
    elseif b.is_done then
      redis.call("HDEL", keys.buckets, b.id)
      redis.call("HSET", keys.retired, b.id, format_bucket(b))
    elseif b.is_changed then
      redis.call("HSET", keys.buckets, b.id, format_bucket(b))
      if b.was_retired then redis.call("HDEL", keys.retired, b.id) end
    end
  end
end
