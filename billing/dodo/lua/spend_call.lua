-- Spends one call to Dodo out of this minute's, shared by every process; refuses where none is left, unless it must.
-- KEYS: budget
-- ARGV: calls a minute (0: as was said last), the share of them that may come at once, 1 if the call is made anyway
-- Returns 1 if spent.
local MINUTE = 60000
local now = store_ms()
local known = redis.call("HMGET", KEYS[1], "level", "seen", "per_minute")
local per_minute = tonumber(ARGV[1])
if per_minute == 0 then per_minute = tonumber(known[3] or "240") end
local burst = math.max(1, math.floor(per_minute / tonumber(ARGV[2])))
local full = burst * MINUTE
local level = tonumber(known[1] or text(full))
level = math.min(full, level + math.max(0, now - tonumber(known[2] or text(now))) * math.max(1, per_minute - burst))
if level < MINUTE and ARGV[3] ~= "1" then return 0 end
-- Calls that could not wait are paid back by those that can, for a minute at most.
level = math.max(level - MINUTE, -per_minute * MINUTE)
redis.call("HSET", KEYS[1], "level", text(level), "seen", text(now), "per_minute", text(per_minute))
return 1
