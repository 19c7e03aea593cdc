-- Spend one of this minute's calls to Dodo, which all processes share; refuse where none is left, unless it must be made.
-- include: store/numbers store/clock
-- writes: yes
-- keys: budget
-- args: asked_per_minute:count burst_share:count reserved_share:count must:flag
-- returns: 1 if spent
-- Without calls a minute (0) it goes by those that were named last; one in `burst_share` of them may come at once.
-- One in `reserved_share` (0 for none) is the caller's even while calls that had to be made have used up all others.

local MINUTE_MS = 60000
local now = store_ms()
local known = redis.call("HMGET", keys.budget, "level", "seen", "per_minute")
local per_minute = asked_per_minute
if per_minute == 0 then per_minute = tonumber(known[3] or "240") end
local burst = math.max(1, math.floor(per_minute / burst_share))
local full = burst * MINUTE_MS
local level = tonumber(known[1] or text(full))
level = math.min(full, level + math.max(0, now - tonumber(known[2] or text(now))) * math.max(1, per_minute - burst))
if level < MINUTE_MS and not must then
  if level >= 0 or reserved_share == 0 then return 0 end
  local share = math.max(1, math.floor(per_minute / reserved_share))
  local most = math.max(1, math.floor(share / burst_share)) * MINUTE_MS
  local kept = redis.call("HMGET", keys.budget, "reserved", "reserved_seen")
  local left = tonumber(kept[1] or text(most)) + math.max(0, now - tonumber(kept[2] or text(now))) * share
  left = math.min(most, left)
  if left < MINUTE_MS then return 0 end
  redis.call("HSET", keys.budget, "reserved", text(left - MINUTE_MS), "reserved_seen", text(now))
end
-- Calls that could not wait are paid back by those that can, for a minute at most.
level = math.max(level - MINUTE_MS, -per_minute * MINUTE_MS)
redis.call("HSET", keys.budget, "level", text(level), "seen", text(now), "per_minute", text(per_minute))
return 1
