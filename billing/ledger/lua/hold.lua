-- Admit one request: limits, then credit for its first step, in one step that changes all or nothing.
-- include: store/numbers store/clock ledger/clock_skew ledger/buckets ledger/waterfall ledger/allowance ledger/markers
--   ledger/caps
-- writes: yes
-- keys: account buckets retired holds leases limits slots settled[]
-- args: id tenant head sizes key model max_cost:nanos initial_hold:nanos min_cost:nanos is_free:flag lease:ms
--   gateway_now:ms window:ms allowance allowance_value former_allowance credit_limit:nanos rpm:count tpm:count
--   concurrency:count tokens:count burst:count month is_preview:flag may_differ:ms caps[window start:ms nanos]
-- reply: held balance lease_end affords requests requests_reset tokens tokens_reset cap_window cap_start cap_nanos cap_spent
--   draws[bucket unit amount] | duplicate | skewed ahead | limited kind limit wait reset
--   | insufficient balance available held | on_hold balance available held
--   | capped window start nanos spent held | cap_on_hold window start nanos spent held
-- A repeat of a hold that is still open returns that hold: its reply may have been lost. A preview says what a hold would
-- get and changes nothing.

local MINUTE_MS = 60000
local now = store_ms()

-- Expiry, periods, caps and the month's volume go by the gateway's clock, so one that is wrong must decide nothing.
if may_differ > 0 and math.abs(gateway_now - now) > may_differ then return { "skewed", text(gateway_now - now) } end

local function answer(balance, lease_end, affords, draws, left, cap)
  local reply = { "held", text(balance), text(lease_end), text(affords), left.requests or "", left.requests_reset or "",
    left.tokens or "", left.tokens_reset or "", cap[1] or "", cap[2] or "", cap[3] or "", cap[4] or "" }
  for _, draw in ipairs(draws) do
    for i = 1, 3 do reply[#reply + 1] = draw[i] end
  end
  return reply
end

if not is_preview then
  local open = redis.call("HGET", keys.holds, id)
  if open then
    local hold = cjson.decode(open)
    if hold.tenant ~= tenant or hold.head ~= head or hold.asked ~= sizes then return { "duplicate" } end
    local lease_end = tonumber(redis.call("ZSCORE", keys.leases, id))
    local balance = balance_of(read_buckets(keys), gateway_now, hold.allowance)
    return answer(balance, lease_end, tonumber(hold.affords), hold.draws, {}, {})
  end
  if find_mark(keys.settled, id, now, window) then return { "duplicate" } end
end

-- Generic cell rate: so many may come at once, and then each in its time. A request larger than all that may come at once
-- passes only when what came before is worn off.
local function arrive(field, limit, cost, at_once)
  local due, ahead_ms = math.max(number_at(keys.limits, field), now), at_once * MINUTE_MS / limit
  local due_next = due + cost * MINUTE_MS / limit
  local over = due_next - now - ahead_ms
  if over > 0 and due > now then return nil, over, due - now end
  return due_next, math.max(0, math.floor((ahead_ms - (due_next - now)) * limit / MINUTE_MS)), due_next - now
end

local function running()
  if redis.call("SCARD", keys.slots) < concurrency then return redis.call("SCARD", keys.slots), {} end
  local count, gone = 0, {}
  for _, other in ipairs(redis.call("SMEMBERS", keys.slots)) do
    local ends = redis.call("ZSCORE", keys.leases, other)
    if ends and tonumber(ends) > now then count = count + 1 else gone[#gone + 1] = other end
  end
  return count, gone
end

local left, arrivals, gone = {}, {}, {}
if rpm > 0 then
  local due, rest, reset = arrive("r:" .. key, rpm, 1, burst)
  if not due then return { "limited", "requests", text(rpm), text(math.ceil(rest)), text(math.ceil(reset)) } end
  arrivals["r:" .. key], left.requests, left.requests_reset = due, text(rest), text(reset)
end
if tpm > 0 then
  local due, rest, reset = arrive("t:" .. key, tpm, tokens, tpm)
  if not due then return { "limited", "tokens", text(tpm), text(math.ceil(rest)), text(math.ceil(reset)) } end
  arrivals["t:" .. key], left.tokens, left.tokens_reset = due, text(rest), text(reset)
end
if concurrency > 0 then
  local count
  count, gone = running()
  if count >= concurrency then return { "limited", "concurrency", text(concurrency), "1000", "1000" } end
end

local buckets = read_buckets(keys)
allowance = put_allowance(keys, buckets, allowance, allowance_value, former_allowance)
local policy = policy_available(gateway_now, allowance, credit_limit)
local by_call = policy_call(gateway_now, allowance, model)
local there, calls = reach(buckets, policy, NONE), reach(buckets, by_call, NONE)
local in_force = caps_in_force(keys.account, key, caps, latest_of(now, gateway_now))
local headroom = headroom_under(keys.account, key, in_force, 0)
local draws, affords, clamped_by = {}, max_cost, {}
if calls.available > 0 and not is_free then
  draws = waterfall(buckets, 1, by_call)
elseif not is_free and max_cost > 0 then
  if there.available < min_cost then
    local refused = refusal(there, min_cost)
    if calls.potential > 0 then refused[1] = "on_hold" end
    return refused
  end
  if headroom.at_once < min_cost then return cap_refusal(headroom, min_cost) end
  affords = math.min(max_cost, there.potential, headroom.potential)
  if headroom.potential < math.min(max_cost, there.potential) then clamped_by = headroom.by end
  draws = waterfall(buckets, math.min(initial_hold, there.available, headroom.at_once), policy)
end
local balance = balance_of(buckets, gateway_now, allowance)
if is_preview then return answer(balance, now + lease, affords, draws, left, clamped_by) end

-- Everything below only writes.
-- What is used up or over is retired. A gateway's clock that is ahead is put right again, and credit comes back from
-- retirement only as an allowance: a pack is over where the store's own clock says so as well.
local function is_done(b)
  if b.is_line or b.held > 0 or b.remaining < 0 then return false end
  if b.is_allowance and allowance ~= "" and b.id ~= allowance then return true end
  if not is_live(b, gateway_now) then return b.remaining == 0 or b.expires <= now end
  return b.remaining == 0 and not b.is_allowance
end

local hold = { tenant = tenant, head = head, asked = sizes, key = key, draws = draws, lease = text(lease),
  affords = text(affords), allowance = allowance, cap = text(credit_limit), tpm = text(tpm), tokens = text(tokens),
  usage = "0,0,0,0,0", list = "0", since = text(now) }
if month ~= "0" then hold.month = month end
if #in_force > 0 then hold.caps = in_force end
redis.call("HSET", keys.holds, id, cjson.encode(hold))
redis.call("ZADD", keys.leases, text(now + lease), id)
redis.call("HINCRBY", keys.account, "open", 1)
if buckets.allowance ~= allowance then redis.call("HSET", keys.account, "allowance", allowance) end
for _, b in ipairs(buckets) do b.is_done = is_done(b) end
write_buckets(keys, buckets)
-- The limits of all keys lie in one hash: it must outlive the latest of them.
local keep_ms = 0
for field, due in pairs(arrivals) do
  redis.call("HSET", keys.limits, field, string.format("%.3f", due))
  keep_ms = math.max(keep_ms, MINUTE_MS, math.ceil(due - now))
end
if keep_ms > 0 and redis.call("PTTL", keys.limits) < keep_ms then
  redis.call("PEXPIRE", keys.limits, text(keep_ms + 2 * MINUTE_MS)) -- not again at once
end
for _, other in ipairs(gone) do redis.call("SREM", keys.slots, other) end
if concurrency > 0 then
  redis.call("SADD", keys.slots, id)
  redis.call("PEXPIRE", keys.slots, 24 * 60 * MINUTE_MS)
end
begin_under(keys.account, key, in_force, nanos_of(draws), 0)
return answer(balance, now + lease, affords, draws, left, clamped_by)
