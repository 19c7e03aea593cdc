-- Settle one request, once: an open hold is charged; a settled one returns its record; one that expired
-- meanwhile is topped up by what its last checkpoint missed, bounded by what is available now.

local keys = { account = KEYS[1], buckets = KEYS[2], holds = KEYS[3], leases = KEYS[4], limits = KEYS[5],
  stream = KEYS[6], settled = { KEYS[7], KEYS[8], KEYS[9], KEYS[10] } }
local id, tenant, status, usage, list = ARGV[1], ARGV[2], ARGV[3], numbers(ARGV[4]), ARGV[5]
local calendar, stretch_ms, held_once = tonumber(ARGV[6]), tonumber(ARGV[7]), tonumber(ARGV[8])
local now = store_ms()

-- Draw `due` units of what the expired hold was made of from what is there now.
local function top_up(expired, buckets, due)
  local draws, taken = {}, 0
  table.sort(buckets, is_drawn_before)
  local room = balance_of(buckets, calendar)
  if expired.unit == "r" then room = due end
  for _, b in ipairs(buckets) do
    local fits = b.unit == expired.unit and (b.unit == "n" or b.id == expired.bucket)
    if fits and b.remaining > 0 and taken < math.min(due, room) and is_live(b, calendar) then
      local part = math.min(b.remaining, math.min(due, room) - taken)
      b.remaining, b.is_changed, taken = b.remaining - part, true, taken + part
      draws[#draws + 1] = { b.id, b.unit, text(part) }
    end
  end
  local exposure = tonumber(expired.cap) - number_at(keys.account, "overage") - number_at(keys.account, "overage_held")
  local overage = math.max(0, math.min(due - taken, exposure))
  if expired.unit == "r" or room < 0 then overage = 0 end
  if overage > 0 then draws[#draws + 1] = { "overage", "n", text(overage) } end
  return draws, taken + overage, overage
end

local function settle_late(expired, key)
  local buckets = read_buckets(keys.buckets)
  if expired.unit == "n" then expired.held = text(math.max(tonumber(expired.held), held_once)) end
  local billed, rest = numbers(expired.usage), {}
  for i = 1, 5 do rest[i] = math.max(0, usage[i] - billed[i]) end
  rest[2] = math.min(rest[2], rest[1])
  local due = math.min(tonumber(list), tonumber(expired.held)) - tonumber(expired.charged)
  if expired.unit == "r" then due = math.min(1, usage[4]) - tonumber(expired.charged) end
  local draws, taken, overage = top_up(expired, buckets, math.max(0, due))
  redis.call("HDEL", key, id)
  if overage > 0 then
    redis.call("HSET", keys.account, "overage", text(number_at(keys.account, "overage") + overage))
  end
  write_changed(keys.buckets, buckets)
  local charged = expired.unit == "n" and taken or 0
  count_under(keys.account, expired.key, expired.caps, 0, charged)
  count_spend(keys.account, expired, charged, latest_of(now, calendar))
  local record = record_json({
    record_id = "rec_" .. id .. "_late", head = expired.head, usage = rest, status = status, now = now,
    list = text(math.max(0, tonumber(list) - tonumber(expired.list))), charged = charged,
    draws = draws, seq = next_seq(keys.account), balance = balance_of(buckets, calendar, expired.allowance),
  })
  mark(keys.settled, id, append(keys, "usage", tenant, record), now, stretch_ms)
  return { "settled", record }
end

-- Where the store lost extensions of a hold, what they paid for is charged all the same: from credit that is left,
-- then from exposure, and what others have drawn meanwhile is owed.
local function regrow(hold)
  local parts, rows, held, first = {}, {}, 0, hold.draws[1]
  for _, draw in ipairs(hold.draws) do parts[draw[1]], held = tonumber(draw[3]), held + tonumber(draw[3]) end
  local rest = first and first[2] == "n" and math.min(tonumber(list), held_once) - held or 0
  if rest <= 0 then return end
  count_under(keys.account, hold.key, hold.caps, rest, 0)
  local buckets = read_buckets(keys.buckets)
  table.sort(buckets, is_drawn_before)
  local function add(name, amount)
    parts[name], rest = (parts[name] or 0) + amount, rest - amount
  end
  local function take(b, amount)
    b.remaining, b.held, b.is_changed = b.remaining - amount, b.held + amount, true
    add(b.id, amount)
  end
  for _, b in ipairs(buckets) do
    if b.unit == "n" and b.remaining > 0 and is_live(b, calendar) then take(b, math.min(b.remaining, rest)) end
  end
  local overage_held = number_at(keys.account, "overage_held")
  local room = tonumber(hold.cap) - number_at(keys.account, "overage") - overage_held
  local overage = math.max(0, math.min(rest, first[1] == "overage" and rest or room))
  if overage > 0 then
    add("overage", overage)
    redis.call("HSET", keys.account, "overage_held", text(overage_held + overage))
  end
  if rest > 0 then take(by_id(buckets)[first[1]], rest) end
  write_changed(keys.buckets, buckets)
  for _, b in ipairs(buckets) do
    if parts[b.id] then rows[#rows + 1] = { b.id, "n", text(parts[b.id]) } end
  end
  if parts.overage then rows[#rows + 1] = { "overage", "n", text(parts.overage) } end
  hold.draws = rows
end

local open = redis.call("HGET", keys.holds, id)
if open then
  local hold = cjson.decode(open)
  if hold.tenant ~= tenant then return { "unknown" } end
  regrow(hold)
  local bill = close_hold(keys, id, hold,
    { usage = usage, list = list, status = status, now = now, calendar = calendar })
  mark(keys.settled, id, bill.entry, now, stretch_ms)
  return { "settled", bill.record }
end

local marker, key = find_marker(keys.settled, id, now, stretch_ms)
if not marker then return { "unknown" } end
if string.sub(marker, 1, 1) == "{" then
  local expired = cjson.decode(marker)
  if expired.tenant ~= tenant then return { "unknown" } end
  return settle_late(expired, key)
end
local entry = redis.call("XRANGE", keys.stream, marker, marker)[1]
if not entry then return { "duplicate" } end
if entry[2][4] ~= tenant then return { "unknown" } end
return { "repeat", entry[2][6] }
