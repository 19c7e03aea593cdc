-- What a key may spend in an hour, a day, a month. What is held counts until it is settled; a request counts in the
-- windows in which it was held, and a window that is over is forgotten. In the account as start|spent|held.

local function read_spend(account, key, window)
  local value = redis.call("HGET", account, "cap:" .. key .. ":" .. window) or "0|0|0"
  local start, spent, held = string.match(value, "^(%d+)|(%d+)|(%d+)$")
  return { start = tonumber(start), spent = tonumber(spent), held = tonumber(held) }
end

-- From window|start|nanos, separated by commas. Who has a late clock counts in the window that others are in,
-- unless that is one that nobody can be in yet.
local function parse_caps(account, key, packed, latest)
  local caps = {}
  for window, start, nanos in string.gmatch(packed, "(%a+)|(%d+)|(%d+)") do
    local known = read_spend(account, key, window).start
    if known > latest then known = 0 end
    caps[#caps + 1] = { window, text(math.max(tonumber(start), known)), nanos }
  end
  return caps
end

-- The least that the caps leave a request that holds `own` already: at once, and in all were others' holds given
-- back. `by` is the cap that decides; a request that outlives its window is alone in it.
local function room_under(account, key, caps, own)
  local room = { at_once = math.huge, potential = math.huge }
  for _, cap in ipairs(caps or {}) do
    local spend, limit = read_spend(account, key, cap[1]), tonumber(cap[3])
    if spend.start ~= tonumber(cap[2]) then spend = { spent = 0, held = own } end
    local at_once, potential = limit - spend.spent - spend.held, limit - spend.spent
    local told = { cap[1], cap[2], cap[3], text(spend.spent), text(spend.held) }
    if at_once < room.at_once then room.at_once, room.by_now = at_once, told end
    if potential < room.potential then room.potential, room.by = potential, told end
  end
  return room
end

local function cap_refusal(room, needed)
  local code, by = "capped", room.by
  if room.potential >= needed then code, by = "cap_on_hold", room.by_now end
  return { code, by[1], by[2], by[3], by[4], by[5] }
end

local function write_spend(account, key, cap, spent, held)
  redis.call("HSET", account, "cap:" .. key .. ":" .. cap[1], table.concat({ cap[2], text(spent), text(held) }, "|"))
end

-- A request is counted for the first time: its windows, as `parse_caps` chose them, begin where they are not there.
local function begin_under(account, key, caps, held, charged)
  for _, cap in ipairs(caps) do
    local spend = read_spend(account, key, cap[1])
    if spend.start ~= tonumber(cap[2]) then spend = { spent = 0, held = 0 } end
    write_spend(account, key, cap, spend.spent + charged, spend.held + held)
  end
end

-- A hold has grown or ended: `held` more or less, `charged` spent. Nothing where its window is over.
local function count_under(account, key, caps, held, charged)
  for _, cap in ipairs(caps or {}) do
    local spend = read_spend(account, key, cap[1])
    if spend.start == tonumber(cap[2]) then
      write_spend(account, key, cap, spend.spent + charged, math.max(0, spend.held + held))
    end
  end
end

local function nanos_of(draws)
  local sum = 0
  for _, draw in ipairs(draws) do
    if draw[2] == "n" then sum = sum + tonumber(draw[3]) end
  end
  return sum
end
