-- Bill the last checkpoint of one hold whose lease has ended, and remember enough of it to settle it late.
-- include: store/numbers store/clock ledger/markers ledger/bill
-- writes: yes
-- keys: account buckets holds leases limits stream movements settled[]
-- args: id tenant gateway_now:ms window:ms
-- returns: 1 if it expired, 0 if it is gone or its lease was renewed
-- A lease without a hold is removed.

local now = store_ms()
local open, ends = redis.call("HGET", keys.holds, id), redis.call("ZSCORE", keys.leases, id)
if not open then
  redis.call("ZREM", keys.leases, id)
  return 0
end
local hold = cjson.decode(open)
if hold.tenant ~= tenant or tonumber(ends) > now then return 0 end
local usage = numbers(hold.usage)
local bill = close_hold(keys, id, hold, { usage = usage, list = tonumber(hold.list), status = "expired",
  held = tonumber(hold.grown or "0"), now = now, gateway_now = gateway_now })
local first = hold.draws[1]
local by_call = first and first[2] == "r"
mark(keys.settled, id, cjson.encode({
  tenant = hold.tenant, entry = bill.entry, head = hold.head, cap = hold.cap, usage = hold.usage, list = hold.list,
  unit = by_call and "r" or "n", bucket = first and first[1] or "",
  key = hold.key, caps = hold.caps, month = hold.month, allowance = hold.allowance,
  held = text(bill.held), charged = by_call and text(math.min(1, usage[4])) or text(bill.charged),
}), now, window)
return 1
