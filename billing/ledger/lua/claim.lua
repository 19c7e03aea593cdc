-- Claim an idempotency key for one request, or say what stands under it.
-- include: store/clock store/numbers ledger/markers ledger/outcome
-- writes: yes
-- keys: answer holds stream settled[]
-- args: request body may_deliver_early lease:ms ttl:ms window:ms
-- reply: claimed | reused | running record kind answer holder | kept record kind answer holder
--   | lost record kind answer holder
-- A claim is fenced: its request may go on only while `stage` still finds it here.

local now = store_ms()

local function claim()
  redis.call("DEL", keys.answer)
  redis.call("HSET", keys.answer, "request", request, "body", body, "early", may_deliver_early, "at", text(now))
  redis.call("PEXPIRE", keys.answer, ttl)
  return { "claimed" }
end

local function found_under(state, record)
  local answer = redis.call("HMGET", keys.answer, "kind", "answer")
  return { state, record or "", answer[1] or "", answer[2] or "", redis.call("HGET", keys.answer, "request") }
end

local found = redis.call("HMGET", keys.answer, "request", "body", "record", "at", "early", "kind")
local holder, record = found[1], found[3]
if not holder then return claim() end
if found[2] ~= body then return { "reused" } end
if record then return found_under("kept", record) end
if holder == request then return { "claimed" } end

local state, settled = outcome_of(keys, holder, now, window)
if state == "unheld" then
  local age = now - tonumber(found[4])
  if age < lease then return found_under("running") end
  -- Never held; or held, and settled longer ago than is remembered. What an answer costs is decided when it is whole; a
  -- stream may have been billed for a part.
  local may_be_charged = found[6] or found[5] == "1"
  state = age >= WINDOWS_REMEMBERED * window and may_be_charged and "lost" or "free"
end
if state == "free" then return claim() end
if state == "kept" then keep(keys, settled, ttl) end
return found_under(state, settled)
