-- What became of the request that claimed an idempotency key: for claim.lua and conclude.lua.

-- The record of a settled or expired request; nil where it was archived since.
local function record_of(keys, marker)
  if string.sub(marker, 1, 1) == "{" then marker = cjson.decode(marker).entry end
  local entry = marker and redis.call("XRANGE", keys.stream, marker, marker)[1]
  return entry and entry[2][6]
end

local function was_answered(record)
  local found = cjson.decode(record)
  return found.status == "complete" or #found.draws > 0
end

-- "running"; "kept" with the record; "lost", where something may have been charged and nobody can say what;
-- or "free": nothing was charged, and after this step nothing will be.
local function outcome_of(keys, request, now, stretch_ms)
  if redis.call("HEXISTS", keys.holds, request) == 1 then return "running" end
  local marker, key = find_marker(keys.settled, request, now, stretch_ms)
  if not marker then return "unheld" end
  local record = record_of(keys, marker)
  if not record then return "lost" end
  if was_answered(record) then return "kept", record end
  -- An expired request may be topped up by a settle that comes late: from here on it gets the record that stands.
  if string.sub(marker, 1, 1) == "{" then redis.call("HSET", key, request, cjson.decode(marker).entry) end
  return "free"
end

local function keep(keys, record, ttl_ms)
  redis.call("HSET", keys.answer, "record", record)
  redis.call("PEXPIRE", keys.answer, ttl_ms)
end
