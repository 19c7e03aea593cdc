-- Raise one open hold to a total, in one step that changes all or nothing. Where there is less than asked
-- for, all there is, if it comes to the least. A total that is held already changes nothing, so a repeat
-- draws nothing twice, and one that comes after the settle finds no hold.

local keys = { account = KEYS[1], buckets = KEYS[2], holds = KEYS[3] }
local id, tenant, total, least, calendar = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])

local open = redis.call("HGET", keys.holds, id)
if not open then return { "unknown" } end
local hold = cjson.decode(open)
if hold.tenant ~= tenant then return { "unknown" } end

local held = 0
for _, draw in ipairs(hold.draws) do
  if draw[2] == "r" then return { "held", draw[3] } end
  held = held + tonumber(draw[3])
end
if held >= total then return { "held", text(held) } end

local buckets = read_buckets(keys.buckets)
table.sort(buckets, is_drawn_before)
local funding = { calendar = calendar, allowance_id = hold.allowance, cap = tonumber(hold.cap) }
local purse = purse_of(keys.account, buckets, funding, hold.draws)
if held + purse.available < least then return refusal(purse, least - held) end
local room = room_under(keys.account, hold.key, hold.caps, held)
if held + room.at_once < least then return cap_refusal(room, least) end
local amount = math.min(total - held, purse.available, room.at_once)
if amount <= 0 then return { "held", text(held) } end
local draws, overage = draw_money(purse, amount)

-- One part for each bucket, in the order in which they will be charged.
local function merged()
  local parts, rows = {}, {}
  for _, drawn in ipairs({ hold.draws, draws }) do
    for _, draw in ipairs(drawn) do parts[draw[1]] = (parts[draw[1]] or 0) + tonumber(draw[3]) end
  end
  for _, b in ipairs(buckets) do
    if parts[b.id] then rows[#rows + 1] = { b.id, "n", text(parts[b.id]) } end
  end
  if parts.overage then rows[#rows + 1] = { "overage", "n", text(parts.overage) } end
  return rows
end

hold.draws = merged()
redis.call("HSET", keys.holds, id, cjson.encode(hold))
if overage > 0 then redis.call("HSET", keys.account, "overage_held", text(purse.overage_held + overage)) end
write_changed(keys.buckets, buckets)
count_under(keys.account, hold.key, hold.caps, amount, 0)
return { "held", text(held + amount) }
