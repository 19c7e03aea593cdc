-- Ending a hold: what is charged, what goes back, and the usage record of it.
-- include: store/numbers ledger/clock_skew ledger/buckets ledger/waterfall ledger/debts ledger/entries ledger/caps

-- A usage is prompt, cached and completion tokens, requests, compute milliseconds, separated by commas.
local function numbers(csv)
  local values = {}
  for part in string.gmatch(csv, "%d+") do values[#values + 1] = tonumber(part) end
  return values
end

local function usage_json(usage)
  return string.format(
    '{"prompt_tokens":%.0f,"cached_tokens":%.0f,"completion_tokens":%.0f,"requests":%.0f,"compute_ms":%.0f}',
    usage[1], usage[2], usage[3], usage[4], usage[5])
end

local function append_record(keys, tenant, r)
  local draws = {}
  for i, draw in ipairs(r.draws) do
    draws[i] = '{"bucket":' .. cjson.encode(draw[1]) .. ',"unit":"' .. (draw[2] == "r" and "requests" or "nanos")
      .. '","amount":' .. draw[3] .. (draw[4] ~= "" and ',"price":' .. draw[4] .. ',"sold":' .. draw[5] or "") .. "}"
  end
  return append(keys, "usage", tenant, function(seq)
    return '{"record_id":' .. cjson.encode(r.record_id) .. "," .. r.head .. ',"usage":' .. usage_json(r.usage)
      .. ',"status":"' .. r.status .. '","occurred_at_ms":' .. text(r.now) .. ',"list_nanos":' .. text(r.list)
      .. ',"charged_nanos":' .. text(r.charged) .. ',"draws":[' .. table.concat(draws, ",") .. ']'
      .. ',"balance_nanos":' .. text(r.balance) .. ',"seq":' .. seq .. "}"
  end)
end

-- Charge draws in their order; the rest of each goes back to the bucket that it came from. A draw that is billed says what
-- its bucket was sold for: { bucket, unit, amount, price, sold }.
local function charge(buckets, draws, due_nanos, due_requests)
  local known, bill = by_id(buckets), { draws = {}, charged = 0 }
  for _, draw in ipairs(draws) do
    local amount, b, part = tonumber(draw[3]), known[draw[1]], nil
    if draw[2] == "r" then
      part = math.min(amount, due_requests)
    else
      part = math.min(amount, due_nanos)
      due_nanos, bill.charged = due_nanos - part, bill.charged + part
    end
    b.held, b.remaining, b.is_changed = b.held - amount, b.remaining + amount - part, true
    if part > 0 then bill.draws[#bill.draws + 1] = { draw[1], draw[2], text(part), b.price, b.sold } end
  end
  return bill
end

-- What a month has cost so far. A hold of an earlier month that ends late counts towards none, nor does one of a month that
-- no clock can have reached.
local function count_spend(account, month, charged, latest)
  month = tonumber(month or "0")
  if month == 0 then return end
  local counted = number_at(account, "month")
  if counted > latest then counted = 0 end
  if month < counted or month > latest then return end
  local before = month == counted and number_at(account, "spent") or 0
  redis.call("HSET", account, "month", text(month), "spent", text(before + charged))
end

-- Tokens that were reserved under the limit and not used are given back to it.
local function return_tokens(keys, hold, usage)
  local per_minute, unused = tonumber(hold.tpm), tonumber(hold.tokens) - usage[1] - usage[3]
  if per_minute == 0 or unused <= 0 then return end
  local field = "t:" .. hold.key
  local due = redis.call("HGET", keys.limits, field)
  if due then
    redis.call("HSET", keys.limits, field, string.format("%.3f", tonumber(due) - unused * 60000 / per_minute))
  end
end

-- The store may have lost extensions of a hold: its gateway had `outcome.held`. What they paid for is drawn again.
local function draw_lost_growth(hold, buckets, outcome, held)
  local lost, drawn = math.min(outcome.list, outcome.held) - held, {}
  if held == 0 or lost <= 0 then return end -- nothing is held of what is free, nor of what a call pays
  for i, draw in ipairs(hold.draws) do drawn[i] = draw[1] end
  local policy = policy_owed("n", outcome.gateway_now, outcome.allowance, tonumber(hold.cap), drawn)
  hold.draws = merged(buckets, { hold.draws, waterfall(buckets, lost, policy) })
end

-- End an open hold. `outcome`: usage, list, status, held, now and gateway_now. Returns what was `held` and `charged`, the
-- record and its entry.
local function close_hold(keys, id, hold, outcome)
  local buckets, held = read_buckets(keys), nanos_of(hold.draws)
  outcome.allowance = buckets.allowance or hold.allowance
  draw_lost_growth(hold, buckets, outcome, held)
  local bill = charge(buckets, hold.draws, outcome.list, math.min(1, outcome.usage[4]))
  -- The first write frees memory: a store that is full still lets holds end.
  redis.call("ZREM", keys.leases, id)
  redis.call("HDEL", keys.holds, id)
  redis.call("HINCRBY", keys.account, "open", -1)
  pay_debts(keys, buckets, outcome.gateway_now)
  write_buckets(keys, buckets)
  count_spend(keys.account, hold.month, bill.charged, latest_of(outcome.now, outcome.gateway_now))
  count_under(keys.account, hold.key, hold.caps, -held, bill.charged)
  return_tokens(keys, hold, outcome.usage)
  bill.held = nanos_of(hold.draws)
  bill.record, bill.entry = append_record(keys, hold.tenant, {
    record_id = "rec_" .. id, head = hold.head, usage = outcome.usage, status = outcome.status, now = outcome.now,
    list = outcome.list, charged = bill.charged, draws = bill.draws,
    balance = balance_of(buckets, outcome.gateway_now, outcome.allowance),
  })
  return bill
end
