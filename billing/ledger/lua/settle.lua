-- Settle one request, once: charge what was served, at most the hold, and free the rest.
-- include: store/clock ledger/clock_skew ledger/buckets ledger/waterfall ledger/debts ledger/markers
--   ledger/caps ledger/bill
-- writes: yes
-- keys: account buckets holds leases limits stream movements settled[]
-- args: id tenant status usage list:nanos held:nanos gateway_now:ms window:ms
-- reply: settled record | repeat record | duplicate | unknown
-- A settled request returns its record. One that expired meanwhile is settled late: what its last checkpoint missed is
-- drawn from what is available now. `held` is what its gateway had of the hold, 0 where it does not say.

local now, used = store_ms(), numbers(usage)

local function settle_late(expired, mark_key)
  local buckets, by_call = read_buckets(keys), expired.unit == "r"
  local allowance = buckets.allowance or expired.allowance
  local due, policy
  if by_call then
    due = math.min(1, used[4])
    policy = policy_call(gateway_now, allowance, nil, expired.bucket)
  else
    due = math.min(list, math.max(tonumber(expired.held), held))
    policy = policy_available(gateway_now, allowance, tonumber(expired.cap))
  end
  due = math.max(0, due - tonumber(expired.charged))
  local bill = charge(buckets, waterfall(buckets, due, policy), due, due)
  local billed, rest = numbers(expired.usage), {}
  for i = 1, 5 do rest[i] = math.max(0, used[i] - billed[i]) end
  rest[2] = math.min(rest[2], rest[1])
  redis.call("HDEL", mark_key, id)
  pay_debts(keys, buckets, gateway_now)
  write_buckets(keys, buckets)
  count_under(keys.account, expired.key, expired.caps, 0, bill.charged)
  count_spend(keys.account, expired.month, bill.charged, latest_of(now, gateway_now))
  local record, entry = append_record(keys, tenant, {
    record_id = "rec_" .. id .. "_late", head = expired.head, usage = rest, status = status, now = now,
    list = math.max(list - tonumber(expired.list), bill.charged), charged = bill.charged, draws = bill.draws,
    balance = balance_of(buckets, gateway_now, allowance),
  })
  mark(keys.settled, id, entry, now, window)
  return { "settled", record }
end

local open = redis.call("HGET", keys.holds, id)
if open then
  local hold = cjson.decode(open)
  if hold.tenant ~= tenant then return { "unknown" } end
  local bill = close_hold(keys, id, hold,
    { usage = used, list = list, status = status, held = held, now = now, gateway_now = gateway_now })
  mark(keys.settled, id, bill.entry, now, window)
  return { "settled", bill.record }
end

local marked, mark_key = find_mark(keys.settled, id, now, window)
if not marked then return { "unknown" } end
if string.sub(marked, 1, 1) == "{" then
  local expired = cjson.decode(marked)
  if expired.tenant ~= tenant then return { "unknown" } end
  return settle_late(expired, mark_key)
end
local entry = redis.call("XRANGE", keys.stream, marked, marked)[1]
if not entry then return { "duplicate" } end
if entry[2][4] ~= tenant then return { "unknown" } end
return { "repeat", entry[2][6] }
