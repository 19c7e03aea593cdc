-- Writing entries of the journal. What stands in one is never changed.
-- include: store/numbers

local function next_seq(account)
  local seq = text(number_at(account, "seq") + 1)
  redis.call("HSET", account, "seq", seq)
  return seq
end

-- Each entry carries a digest of itself and of the tenant's entry before it: none is altered unseen.
local function append(keys, kind, tenant, payload)
  local before = redis.call("HGET", keys.account, "chain") or ""
  local chain = string.sub(redis.sha1hex(before .. kind .. payload), 1, 16)
  redis.call("HSET", keys.account, "chain", chain)
  return redis.call("XADD", keys.stream, "*", "k", kind, "t", tenant, "p", payload, "c", chain)
end

-- `paid`: what the movement let one bucket pay of another's debt; below zero where that came back.
local function paid_json(payments)
  local rows = {}
  for i, payment in ipairs(payments) do
    rows[i] = '{"bucket":' .. cjson.encode(payment.payer) .. ',"debt":' .. cjson.encode(payment.debt) .. ',"amount":'
      .. text(payment.amount) .. "}"
  end
  return ',"paid":[' .. table.concat(rows, ",") .. "]"
end

local function append_movement(keys, kind, tenant, m)
  local payload = '{"source":' .. cjson.encode(m.source) .. ',"unit":"' .. (m.unit == "r" and "requests" or "nanos")
    .. '","amount":' .. text(m.amount) .. ',"bucket":' .. cjson.encode(m.bucket) .. ',"seq":' .. next_seq(keys.account)
    .. ',"balance_nanos":' .. text(m.balance) .. ',"occurred_at_ms":' .. text(m.now)
    .. (m.reason and ',"reason":' .. cjson.encode(m.reason) or "")
    .. (m.paid and #m.paid > 0 and paid_json(m.paid) or "") .. "}"
  append(keys, kind, tenant, payload)
end
