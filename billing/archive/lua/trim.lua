-- Remove entries that are both sealed for export and archived, and older than is still asked for.
-- include: store/clock
-- writes: yes
-- keys: cursor stream
-- args: keep:ms
-- returns: how many were removed

local function parse(id)
  local ms, number = string.match(id or "0-0", "^(%d+)-(%d+)$")
  return tonumber(ms), tonumber(number)
end

local sealed_ms, sealed_number = parse(redis.call("HGET", keys.cursor, "at"))
local ms, number = parse(redis.call("HGET", keys.cursor, "archived"))
if sealed_ms < ms or (sealed_ms == ms and sealed_number < number) then
  ms, number = sealed_ms, sealed_number
end
local kept_from = store_ms() - keep
local first = string.format("%.0f-%.0f", ms, number + 1)
if kept_from <= ms then first = string.format("%.0f-0", math.max(0, kept_from)) end
return redis.call("XTRIM", keys.stream, "MINID", first)
