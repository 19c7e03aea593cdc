-- What a key may spend in an hour, a day, a month.
-- include: store/numbers
--
-- What is held counts until it is settled. A request counts in the windows in which it was held, and a window that is over
-- is forgotten. The account has, for each key and window, start|spent|held. A cap is { window, start, nanos }, as texts.

local function read_spend(account, key, window)
  local value = redis.call("HGET", account, "cap:" .. key .. ":" .. window) or "0|0|0"
  local start, spent, held = string.match(value, "^(%d+)|(%d+)|(%d+)$")
  return { start = tonumber(start), spent = tonumber(spent), held = tonumber(held) }
end

-- A gateway whose clock is behind counts in the window that the others are in, unless that is one that no clock can have
-- reached: after `latest`.
local function caps_in_force(account, key, asked, latest)
  local caps = {}
  for i, cap in ipairs(asked) do
    local known = read_spend(account, key, cap.window).start
    if known > latest then known = 0 end
    caps[i] = { cap.window, text(math.max(cap.start, known)), cap.nanos }
  end
  return caps
end

-- The least that the caps leave to a request that holds `own` already: at once, and in all were others' holds given back.
-- `by` is the cap that decides; a request that outlives its window is alone in it.
local function headroom_under(account, key, caps, own)
  local headroom = { at_once = math.huge, potential = math.huge }
  for _, cap in ipairs(caps or {}) do
    local spend, limit = read_spend(account, key, cap[1]), tonumber(cap[3])
    if spend.start ~= tonumber(cap[2]) then spend = { spent = 0, held = own } end
    local at_once, potential = limit - spend.spent - spend.held, limit - spend.spent
    local decides = { cap[1], cap[2], cap[3], text(spend.spent), text(spend.held) }
    if at_once < headroom.at_once then headroom.at_once, headroom.by_now = at_once, decides end
    if potential < headroom.potential then headroom.potential, headroom.by = potential, decides end
  end
  return headroom
end

local function cap_refusal(headroom, needed)
  local state, by = "capped", headroom.by
  if headroom.potential >= needed then state, by = "cap_on_hold", headroom.by_now end
  return { state, by[1], by[2], by[3], by[4], by[5] }
end

local function write_spend(account, key, cap, spent, held)
  redis.call("HSET", account, "cap:" .. key .. ":" .. cap[1], table.concat({ cap[2], text(spent), text(held) }, "|"))
end

-- A request is counted for the first time: its windows begin where they are not there.
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
