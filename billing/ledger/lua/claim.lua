-- Claim an idempotency key for one request, or tell what stands under it.
-- A claim is fenced: its request may go on only while `stage` still finds it here.

local keys = { answer = KEYS[1], holds = KEYS[2], stream = KEYS[3], settled = { KEYS[4], KEYS[5], KEYS[6], KEYS[7] } }
local request, body, may_deliver_early = ARGV[1], ARGV[2], ARGV[3]
local lease_ms, ttl_ms, stretch_ms = tonumber(ARGV[4]), ARGV[5], tonumber(ARGV[6])
local now = store_ms()

local function claim()
  redis.call("DEL", keys.answer)
  redis.call("HSET", keys.answer, "request", request, "body", body, "early", may_deliver_early, "at", text(now))
  redis.call("PEXPIRE", keys.answer, ttl_ms)
  return { "claimed" }
end

local function told(state, record)
  local answer = redis.call("HMGET", keys.answer, "kind", "answer")
  return { state, record or "", answer[1] or "", answer[2] or "", redis.call("HGET", keys.answer, "request") }
end

local found = redis.call("HMGET", keys.answer, "request", "body", "record", "at", "early", "kind")
local holder, record = found[1], found[3]
if not holder then return claim() end
if found[2] ~= body then return { "reused" } end
if record then return told("kept", record) end
if holder == request then return { "claimed" } end

local state, settled = outcome_of(keys, holder, now, stretch_ms)
if state == "unheld" then
  local age = now - tonumber(found[4])
  if age < lease_ms then return told("running") end
  -- Never held; or held, and settled longer ago than is remembered. What an answer costs is decided when
  -- it is whole; a stream may have been billed for a part.
  local may_be_charged = found[6] or found[5] == "1"
  state = age >= STRETCHES_REMEMBERED * stretch_ms and may_be_charged and "lost" or "free"
end
if state == "free" then return claim() end
if state == "kept" then keep(keys, settled, ttl_ms) end
return told(state, settled)
