-- What became of the request that claimed an idempotency key.
-- include: ledger/markers

-- The record of a settled or expired request; nil where it was archived since.
local function record_of(keys, value)
  if string.sub(value, 1, 1) == "{" then value = cjson.decode(value).entry end
  local entry = value and redis.call("XRANGE", keys.stream, value, value)[1]
  return entry and entry[2][6]
end

local function was_answered(record)
  local found = cjson.decode(record)
  return found.status == "complete" or #found.draws > 0
end

-- "running"; "kept" with the record; "lost", where something may have been charged and nothing says what; "unheld", where
-- neither hold nor mark is there; or "free": nothing was charged, and after this step nothing will be.
local function outcome_of(keys, request, now, window_ms)
  if redis.call("HEXISTS", keys.holds, request) == 1 then return "running" end
  local value, key = find_mark(keys.settled, request, now, window_ms)
  if not value then return "unheld" end
  local record = record_of(keys, value)
  if not record then return "lost" end
  if was_answered(record) then return "kept", record end
  -- A late settle may still charge an expired request: from here on it gets the record that stands.
  if string.sub(value, 1, 1) == "{" then redis.call("HSET", key, request, cjson.decode(value).entry) end
  return "free"
end

local function keep(keys, record, ttl)
  redis.call("HSET", keys.answer, "record", record)
  redis.call("PEXPIRE", keys.answer, ttl)
end
