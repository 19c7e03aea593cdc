-- Spend one of this minute's calls to Dodo, which all processes share; refuse where none is left, unless it must be made.
-- include: store/numbers store/clock
-- writes: yes
-- keys: budget
-- args: asked_per_minute:count burst_share:count must:flag
-- returns: 1 if spent
-- Without calls a minute (0) it goes by those that were named last; one in `burst_share` of them may come at once.

local MINUTE_MS = 60000
local now = store_ms()
local known = redis.call("HMGET", keys.budget, "level", "seen", "per_minute")
local per_minute = asked_per_minute
if per_minute == 0 then per_minute = tonumber(known[3] or "240") end
local burst = math.max(1, math.floor(per_minute / burst_share))
local full = burst * MINUTE_MS
local level = tonumber(known[1] or text(full))
level = math.min(full, level + math.max(0, now - tonumber(known[2] or text(now))) * math.max(1, per_minute - burst))
if level < MINUTE_MS and not must then return 0 end
-- Calls that could not wait are paid back by those that can, for a minute at most.
level = math.max(level - MINUTE_MS, -per_minute * MINUTE_MS)
redis.call("HSET", keys.budget, "level", text(level), "seen", text(now), "per_minute", text(per_minute))
return 1
