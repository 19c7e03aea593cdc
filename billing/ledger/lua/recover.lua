-- Charge a settle whose hold and mark the store has lost, as if it still had them, or keep it unresolved.
-- include: store/clock store/numbers ledger/clock_skew ledger/buckets ledger/waterfall ledger/allowance ledger/debts
--   ledger/markers ledger/caps ledger/bill
-- writes: yes
-- keys: account buckets retired holds stream unresolved movements settled[]
-- args: id tenant status usage list:nanos head unit held credit_limit:nanos held_at:ms gateway_now:ms window:ms key
--   month allowance allowance_value is_sure:flag settlement drawn[] caps[window start:ms nanos]
-- reply: settled record | known | kept reason
-- What it needs of the hold comes with the settle: `head` to `drawn`, the ids of the buckets in drawing order. A request
-- settles after its hold, so while the marks of that time are all remembered, no mark means that it was never charged. What
-- is older than that is for the operator to find out, who is then sure.

local TOO_OLD, NOT_THERE = "it is too old to be sure that it was never charged", "the credit that it drew on is not there"
local now, used = store_ms(), numbers(usage)

local function keep_unresolved(reason)
  local kept = cjson.encode({ at = text(now), reason = reason, settlement = settlement })
  redis.call("HSETNX", keys.unresolved, id, kept)
  return { "kept", reason }
end

if redis.call("HEXISTS", keys.holds, id) == 1 or find_mark(keys.settled, id, now, window) then return { "known" } end
if not is_sure then
  local kept = redis.call("HGET", keys.unresolved, id)
  if kept and cjson.decode(kept).reason ~= NOT_THERE then return { "kept", "its operator decides" } end
  if now - held_at >= WINDOWS_REMEMBERED * window then return keep_unresolved(TOO_OLD) end
end

local due = unit == "r" and math.min(1, used[4]) or math.min(list, tonumber(held))
if #drawn == 0 then due = 0 end
local buckets = read_buckets(keys)
if due > 0 then
  for _, bucket in ipairs(drawn) do
    if bucket == allowance then put_allowance(keys, buckets, allowance, allowance_value, "") end
    if not find_bucket(keys, buckets, bucket) then return keep_unresolved(NOT_THERE) end
  end
end
local in_force = buckets.allowance or allowance ~= "" and allowance or nil
local policy = policy_owed(unit, gateway_now, in_force, credit_limit, drawn)
local bill = charge(buckets, due > 0 and waterfall(buckets, due, policy) or {}, due, due)
pay_debts(keys, buckets, gateway_now)
write_buckets(keys, buckets)
-- It counts in the windows in which it was held, where those are not over.
local latest, counted = latest_of(now, gateway_now), {}
for i, cap in ipairs(caps_in_force(keys.account, key, caps, latest)) do
  if cap[2] == text(caps[i].start) then counted[#counted + 1] = cap end
end
begin_under(keys.account, key, counted, 0, bill.charged)
count_spend(keys.account, month, bill.charged, latest)
local record, entry = append_record(keys, tenant, {
  record_id = "rec_" .. id, head = head, usage = used, status = status, now = now, list = list, charged = bill.charged,
  draws = bill.draws, balance = balance_of(buckets, gateway_now, buckets.allowance),
})
mark(keys.settled, id, entry, now, window)
redis.call("HDEL", keys.unresolved, id)
return { "settled", record }
