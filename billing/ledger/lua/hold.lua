-- Admit one request: limits, then credit for its first step, in one step that changes all or nothing.
-- A repeat of a hold that is still open returns that hold: its reply may have been lost.

local keys = { account = KEYS[1], buckets = KEYS[2], retired = KEYS[3], holds = KEYS[4], leases = KEYS[5],
  limits = KEYS[6], slots = KEYS[7], settled = { KEYS[8], KEYS[9], KEYS[10], KEYS[11] } }
local id, tenant, head, asked, key_id = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local worst, first, least = tonumber(ARGV[6]), tonumber(ARGV[7]), tonumber(ARGV[8])
local is_free, model = ARGV[9] == "1", ARGV[10]
local lease_ms, calendar, stretch_ms = tonumber(ARGV[11]), tonumber(ARGV[12]), tonumber(ARGV[13])
local allowance_id, allowance_value, overage_cap = ARGV[14], ARGV[15], tonumber(ARGV[16])
local rpm, tpm, concurrency, tokens = tonumber(ARGV[17]), tonumber(ARGV[18]), tonumber(ARGV[19]), tonumber(ARGV[20])
local is_preview, month, burst, may_differ_ms = ARGV[21] == "1", ARGV[22], tonumber(ARGV[23]), tonumber(ARGV[25])
local now = store_ms()
local MINUTE_MS = 60000

-- Expiry, periods, caps and the month's volume go by the caller's calendar: one that is wrong decides nothing.
if may_differ_ms > 0 and math.abs(calendar - now) > may_differ_ms then return { "astray", text(calendar - now) } end

local function answer(balance, lease_end, affords, draws, left, clamped_by)
  local reply = { "held", text(balance), text(lease_end), text(affords), left.requests or "",
    left.requests_reset or "", left.tokens or "", left.tokens_reset or "", table.concat(clamped_by, "|") }
  for _, draw in ipairs(draws) do
    for i = 1, 3 do reply[#reply + 1] = draw[i] end
  end
  return reply
end

if not is_preview then
  local open = redis.call("HGET", keys.holds, id)
  if open then
    local hold = cjson.decode(open)
    if hold.tenant ~= tenant or hold.head ~= head or hold.asked ~= asked then return { "duplicate" } end
    local ends = tonumber(redis.call("ZSCORE", keys.leases, id))
    return answer(balance_of(read_buckets(keys.buckets), calendar, allowance_id), ends, tonumber(hold.affords), hold.draws, {}, {})
  end
  if find_marker(keys.settled, id, now, stretch_ms) then return { "duplicate" } end
end

-- Generic cell rate: so many may come at once, and then each in its time. A request larger than all that may
-- come at once passes only when what came before is worn off.
local function arrive(field, limit, cost, at_once)
  local due, ahead_ms = math.max(number_at(keys.limits, field), now), at_once * MINUTE_MS / limit
  local due_next = due + cost * MINUTE_MS / limit
  local over = due_next - now - ahead_ms
  if over > 0 and due > now then return nil, over, due - now end
  return due_next, math.max(0, math.floor((ahead_ms - (due_next - now)) * limit / MINUTE_MS)), due_next - now
end

local function running()
  if redis.call("SCARD", keys.slots) < concurrency then return redis.call("SCARD", keys.slots), {} end
  local count, gone = 0, {}
  for _, other in ipairs(redis.call("SMEMBERS", keys.slots)) do
    local ends = redis.call("ZSCORE", keys.leases, other)
    if ends and tonumber(ends) > now then count = count + 1 else gone[#gone + 1] = other end
  end
  return count, gone
end

local left, arrivals, gone = {}, {}, {}
if rpm > 0 then
  local due, rest, reset = arrive("r:" .. key_id, rpm, 1, burst)
  if not due then return { "limited", "requests", text(rpm), text(math.ceil(rest)), text(math.ceil(reset)) } end
  arrivals["r:" .. key_id], left.requests, left.requests_reset = due, text(rest), text(reset)
end
if tpm > 0 then
  local due, rest, reset = arrive("t:" .. key_id, tpm, tokens, tpm)
  if not due then return { "limited", "tokens", text(tpm), text(math.ceil(rest)), text(math.ceil(reset)) } end
  arrivals["t:" .. key_id], left.tokens, left.tokens_reset = due, text(rest), text(reset)
end
if concurrency > 0 then
  local count
  count, gone = running()
  if count >= concurrency then return { "limited", "concurrency", text(concurrency), "1000", "1000" } end
end

-- The allowance of this period is put in place once: under its id it is never filled again. It ends with its
-- period, which a pause of the subscription puts off.
local buckets = read_buckets(keys.buckets)
if allowance_id ~= "" then
  local given, b = parse_bucket(allowance_id, allowance_value), by_id(buckets)[allowance_id]
  if not b then
    local retired = redis.call("HGET", keys.retired, allowance_id)
    b = retired and parse_bucket(allowance_id, retired) or given
    b.is_changed, b.was_retired = true, retired and true
    buckets[#buckets + 1] = b
  end
  if b.expires < given.expires then b.expires, b.is_changed = given.expires, true end
end
table.sort(buckets, is_drawn_before)

local function covers(b)
  return b.unit == "r" and (b.adapters == "" or string.find("," .. b.adapters .. ",", "," .. model .. ",", 1, true))
end

-- The bucket whose call pays for this request; and whether there would be one, were others' calls given back.
local function covering_bucket()
  local sum, held, first = 0, 0, nil
  for _, b in ipairs(buckets) do
    if covers(b) and is_drawable(b, calendar, allowance_id) then
      sum, held = sum + b.remaining, held + b.held
      if not first and b.remaining > 0 then first = b end
    end
  end
  return sum > 0 and first or nil, sum + held > 0
end

local funding = { calendar = calendar, allowance_id = allowance_id, cap = overage_cap }
local purse = purse_of(keys.account, buckets, funding, {})
local caps = parse_caps(keys.account, key_id, ARGV[24], latest_of(now, calendar))
local room = room_under(keys.account, key_id, caps, 0)
local draws, overage, affords, clamped_by = {}, 0, worst, {}
local cover, could_cover = covering_bucket()
if cover and not is_free then
  cover.remaining, cover.held, cover.is_changed = cover.remaining - 1, cover.held + 1, true
  draws = { { cover.id, "r", "1" } }
elseif not is_free and worst > 0 then
  if purse.available < least then
    local refused = refusal(purse, least)
    if could_cover then refused[1] = "on_hold" end
    return refused
  end
  if room.at_once < least then return cap_refusal(room, least) end
  affords = math.min(worst, purse.potential, room.potential)
  if room.potential < math.min(worst, purse.potential) then clamped_by = room.by end
  draws, overage = draw_money(purse, math.min(first, purse.available, room.at_once))
end
if is_preview then return answer(purse.balance, now + lease_ms, affords, draws, left, clamped_by) end

-- Everything below only writes.
-- A calendar that is ahead is put right again, and credit comes back from retirement only as an allowance: it has
-- ended where the store's own clock says so as well.
local function is_done(b)
  if b.held > 0 or b.remaining < 0 then return false end
  if b.is_allowance and allowance_id ~= "" and b.id ~= allowance_id then return true end
  if not is_live(b, calendar) then return b.remaining == 0 or b.expires <= now end
  return b.remaining == 0 and not b.is_allowance
end

local hold = { tenant = tenant, head = head, asked = asked, key = key_id, draws = draws, lease = text(lease_ms),
  affords = text(affords), allowance = allowance_id, cap = text(overage_cap), tpm = text(tpm), tokens = text(tokens),
  usage = "0,0,0,0,0", list = "0" }
hold.since = text(now)
if month ~= "0" then hold.month = month end
if #caps > 0 then hold.caps = caps end
redis.call("HSET", keys.holds, id, cjson.encode(hold))
redis.call("ZADD", keys.leases, text(now + lease_ms), id)
redis.call("HINCRBY", keys.account, "open", 1)
if overage > 0 then redis.call("HSET", keys.account, "overage_held", text(purse.overage_held + overage)) end
for _, b in ipairs(buckets) do
  if is_done(b) then
    redis.call("HDEL", keys.buckets, b.id)
    write_bucket(keys.retired, b)
  elseif b.is_changed then
    write_bucket(keys.buckets, b)
    if b.was_retired then redis.call("HDEL", keys.retired, b.id) end
  end
end
-- The limits of all keys lie in one hash: it must outlive the latest of them.
local keep_ms = math.max(2 * MINUTE_MS, redis.call("PTTL", keys.limits))
for field, due in pairs(arrivals) do
  redis.call("HSET", keys.limits, field, string.format("%.3f", due))
  keep_ms = math.max(keep_ms, math.ceil(due - now))
end
if next(arrivals) then redis.call("PEXPIRE", keys.limits, text(keep_ms)) end
for _, other in ipairs(gone) do redis.call("SREM", keys.slots, other) end
if concurrency > 0 then
  redis.call("SADD", keys.slots, id)
  redis.call("PEXPIRE", keys.slots, 24 * 60 * MINUTE_MS)
end
begin_under(keys.account, key_id, caps, nanos_of(draws), 0)
return answer(purse.balance, now + lease_ms, affords, draws, left, clamped_by)
