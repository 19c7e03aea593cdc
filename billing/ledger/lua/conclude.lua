-- A claim's request has ended: keep what was charged, free the key where nothing was.

local keys = { answer = KEYS[1], holds = KEYS[2], stream = KEYS[3], settled = { KEYS[4], KEYS[5], KEYS[6], KEYS[7] } }
local request, ttl_ms, stretch_ms = ARGV[1], ARGV[2], tonumber(ARGV[3])

local found = redis.call("HMGET", keys.answer, "request", "record")
if found[1] ~= request or found[2] then return 0 end
local state, record = outcome_of(keys, request, store_ms(), stretch_ms)
if state == "kept" then keep(keys, record, ttl_ms) end
if state == "free" or state == "unheld" then redis.call("DEL", keys.answer) end
return 1
