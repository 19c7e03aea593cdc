-- A claim's request has ended: keep what was charged, free the key where nothing was.
-- include: store/clock ledger/outcome
-- writes: yes
-- keys: answer holds stream settled[]
-- args: request ttl:ms window:ms
-- returns: 1 if the key was this request's and not concluded before

local found = redis.call("HMGET", keys.answer, "request", "record")
if found[1] ~= request or found[2] then return 0 end
local state, record = outcome_of(keys, request, store_ms(), window)
if state == "kept" then keep(keys, record, ttl) end
if state == "free" or state == "unheld" then redis.call("DEL", keys.answer) end
return 1
