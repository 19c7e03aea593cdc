-- A tenant's account as of one moment: what a hold would find there.
-- include: store/numbers ledger/buckets ledger/waterfall ledger/allowance
-- writes: no
-- keys: account buckets retired
-- args: gateway_now:ms is_funded:flag allowance allowance_value former_allowance credit_limit:nanos
-- reply: account seq open balance available held held_requests exposure allowance buckets[id value]
-- Not `is_funded`: with the allowance in force, and no credit line. `held` is nanos, exposure included; `exposure` is
-- settled; `allowance` is the id of the one that counts. Buckets stand in drawing order, without those that are over or left behind with nothing owed.

local buckets = read_buckets(keys)
local counts = buckets.allowance
if is_funded then counts = put_allowance(keys, buckets, allowance, allowance_value, former_allowance) end
local policy, by_call = policy_available(gateway_now, counts, credit_limit), policy_call(gateway_now, counts)
local there, line, held = reach(buckets, policy, {}), by_id(buckets)[LINE], { n = 0, r = 0 }
for _, b in ipairs(buckets) do held[b.unit] = held[b.unit] + b.held end
local numbers = redis.call("HMGET", keys.account, "seq", "open")
local reply = { "account", numbers[1] or "0", numbers[2] or "0", text(there.money), text(there.available), text(held.n),
  text(held.r), text(-line.remaining - line.held), counts or "" }
for _, b in ipairs(buckets) do
  if not b.is_line and (is_drawable(b, policy) or is_drawable(b, by_call)) then
    reply[#reply + 1] = b.id
    reply[#reply + 1] = format_bucket(b)
  end
end
return reply
