-- Bill the last checkpoint of one hold whose lease has ended, and remember enough to top it up later.

local keys = { account = KEYS[1], buckets = KEYS[2], holds = KEYS[3], leases = KEYS[4], limits = KEYS[5],
  stream = KEYS[6], settled = { KEYS[7], KEYS[8], KEYS[9], KEYS[10] } }
local id, calendar, stretch_ms = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local now = store_ms()

local open, ends = redis.call("HGET", keys.holds, id), redis.call("ZSCORE", keys.leases, id)
if not open or tonumber(ends) > now then return 0 end
local hold = cjson.decode(open)
local usage = numbers(hold.usage)
local bill = close_hold(keys, id, hold,
  { usage = usage, list = hold.list, status = "expired", now = now, calendar = calendar })
local first = hold.draws[1]
local by_request = first and first[2] == "r"
mark(keys.settled, id, cjson.encode({
  tenant = hold.tenant, entry = bill.entry, head = hold.head, cap = hold.cap, usage = hold.usage, list = hold.list,
  unit = by_request and "r" or "n", bucket = first and first[1] or "",
  key = hold.key, caps = hold.caps, month = hold.month, allowance = hold.allowance,
  held = text(bill.held), charged = by_request and text(math.min(1, usage[4])) or text(bill.charged),
}), now, stretch_ms)
return 1
