-- Removes entries that are both sealed for export and archived, and older than is still asked for.
-- KEYS: cursor, stream
-- ARGV: milliseconds to keep
-- Returns how many were removed.
local function parse(id)
  local ms, number = string.match(id or '0-0', '^(%d+)-(%d+)$')
  return tonumber(ms), tonumber(number)
end

local sealed_ms, sealed_number = parse(redis.call('HGET', KEYS[1], 'at') or '0-0')
local ms, number = parse(redis.call('HGET', KEYS[1], 'archived') or '0-0')
if sealed_ms < ms or (sealed_ms == ms and sealed_number < number) then
  ms, number = sealed_ms, sealed_number
end
local time = redis.call('TIME')
local kept_from = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000) - tonumber(ARGV[1])
local first = string.format('%.0f-%.0f', ms, number + 1)
if kept_from <= ms then
  first = string.format('%.0f-0', math.max(0, kept_from))
end
return redis.call('XTRIM', KEYS[2], 'MINID', first)
