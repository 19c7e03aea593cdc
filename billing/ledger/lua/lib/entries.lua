-- Writing entries of the journal. What stands in one is never changed.
-- include: store/numbers

-- Append one entry: `write` makes its payload, given its number. Each entry carries a digest of itself and of the tenant's
-- entry before it, so that none is altered unseen. Returns the payload and the entry's id.
local function append(keys, kind, tenant, write)
  local last = redis.call("HMGET", keys.account, "seq", "chain")
  local seq = text(tonumber(last[1] or "0") + 1)
  local payload = write(seq)
  local chain = string.sub(redis.sha1hex((last[2] or "") .. kind .. payload), 1, 16)
  redis.call("HSET", keys.account, "seq", seq, "chain", chain)
  return payload, redis.call("XADD", keys.stream, "*", "k", kind, "t", tenant, "p", payload, "c", chain)
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

-- A grant that was sold says for what, and when it expires; 0 is never.
local function append_movement(keys, kind, tenant, m)
  append(keys, kind, tenant, function(seq)
    return '{"source":' .. cjson.encode(m.source) .. ',"unit":"' .. (m.unit == "r" and "requests" or "nanos")
      .. '","amount":' .. text(m.amount) .. ',"bucket":' .. cjson.encode(m.bucket) .. ',"seq":' .. seq
      .. ',"balance_nanos":' .. text(m.balance) .. ',"occurred_at_ms":' .. text(m.now)
      .. (m.price and m.price ~= "" and ',"price":' .. m.price .. ',"expires_at_ms":' .. text(m.expires) or "")
      .. (m.reason and ',"reason":' .. cjson.encode(m.reason) or "")
      .. (m.paid and #m.paid > 0 and paid_json(m.paid) or "") .. "}"
  end)
end
