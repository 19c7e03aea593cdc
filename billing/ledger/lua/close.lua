-- Ending a hold, for settle.lua and expire.lua: what is charged, what goes back, and the record of it.

local function numbers(csv)
  local values = {}
  for part in string.gmatch(csv, "%d+") do values[#values + 1] = tonumber(part) end
  return values -- prompt, cached, completion tokens, requests, compute milliseconds
end

local function usage_json(usage)
  return string.format(
    '{"prompt_tokens":%.0f,"cached_tokens":%.0f,"completion_tokens":%.0f,"requests":%.0f,"compute_ms":%.0f}',
    usage[1], usage[2], usage[3], usage[4], usage[5])
end

local function record_json(r)
  local draws = {}
  for i, draw in ipairs(r.draws) do
    draws[i] = '{"bucket":' .. cjson.encode(draw[1]) .. ',"unit":"' .. (draw[2] == "r" and "requests" or "nanos")
      .. '","amount":' .. draw[3] .. "}"
  end
  return '{"record_id":' .. cjson.encode(r.record_id) .. "," .. r.head .. ',"usage":' .. usage_json(r.usage)
    .. ',"status":"' .. r.status .. '","occurred_at_ms":' .. text(r.now) .. ',"list_nanos":' .. r.list
    .. ',"charged_nanos":' .. text(r.charged) .. ',"draws":[' .. table.concat(draws, ",") .. ']'
    .. ',"balance_nanos":' .. text(r.balance) .. ',"seq":' .. r.seq .. "}"
end

-- Tokens that were reserved under the limit and not used are given back to it.
local function return_tokens(keys, hold, usage)
  local tpm, unused = tonumber(hold.tpm), tonumber(hold.tokens) - usage[1] - usage[3]
  if tpm == 0 or unused <= 0 then return end
  local field = "t:" .. hold.key
  local due = redis.call("HGET", keys.limits, field)
  if due then redis.call("HSET", keys.limits, field, string.format("%.3f", tonumber(due) - unused * 60000 / tpm)) end
end

-- Charge draws in the order they were drawn; the rest of each goes back to where it came from.
local function charge(hold, known, usage, list)
  local held, due_nanos, due_requests = 0, tonumber(list), math.min(1, usage[4])
  local spent, charged, overage, returned_overage = {}, 0, 0, 0
  for _, draw in ipairs(hold.draws) do
    local amount, b, part = tonumber(draw[3]), known[draw[1]], nil
    if draw[2] == "r" then
      part = math.min(amount, due_requests)
    else
      part = math.min(amount, due_nanos)
      due_nanos, charged, held = due_nanos - part, charged + part, held + amount
    end
    if draw[1] == "overage" then
      overage, returned_overage = part, amount
    else
      b.held, b.remaining, b.is_changed = b.held - amount, b.remaining + amount - part, true
    end
    if part > 0 then spent[#spent + 1] = { draw[1], draw[2], text(part) } end
  end
  return { spent = spent, charged = charged, held = held, overage = overage, returned_overage = returned_overage }
end

-- What a month has cost so far; a hold of an earlier month that ends late counts towards none, and so does one of a
-- month that nobody can be in yet.
local function count_spend(account, hold, charged, latest)
  local month = tonumber(hold.month or "0")
  if month == 0 then return end
  local counted = number_at(account, "month")
  if counted > latest then counted = 0 end
  if month < counted or month > latest then return end
  local before = month == counted and number_at(account, "spent") or 0
  redis.call("HSET", account, "month", hold.month, "spent", text(before + charged))
end

-- The first write frees memory: a store that is full still lets holds end.
local function close_hold(keys, id, hold, outcome)
  local buckets = read_buckets(keys.buckets)
  local bill = charge(hold, by_id(buckets), outcome.usage, outcome.list)
  redis.call("ZREM", keys.leases, id)
  redis.call("HDEL", keys.holds, id)
  redis.call("HINCRBY", keys.account, "open", -1)
  if bill.returned_overage > 0 then
    redis.call("HSET", keys.account,
      "overage", text(number_at(keys.account, "overage") + bill.overage),
      "overage_held", text(number_at(keys.account, "overage_held") - bill.returned_overage))
  end
  write_changed(keys.buckets, buckets)
  count_spend(keys.account, hold, bill.charged, latest_of(outcome.now, outcome.calendar))
  count_under(keys.account, hold.key, hold.caps, -bill.held, bill.charged)
  return_tokens(keys, hold, outcome.usage)
  bill.record = record_json({
    record_id = "rec_" .. id, head = hold.head, usage = outcome.usage, status = outcome.status, now = outcome.now,
    list = outcome.list, charged = bill.charged, draws = bill.spent, seq = next_seq(keys.account),
    balance = balance_of(buckets, outcome.calendar, hold.allowance),
  })
  bill.entry = append(keys, "usage", hold.tenant, bill.record)
  return bill
end
