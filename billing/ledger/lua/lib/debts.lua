-- Debts: buckets below zero after a refund, a lost dispute or a loss of the store.
-- include: store/numbers ledger/buckets ledger/waterfall ledger/entries
--
-- Only what no open hold can give back is a debt: remaining and held together are below zero. Packs of the same unit and
-- scope pay it as soon as they have something, so that no credit expires beside it; an allowance pays nothing. Which pack
-- paid how much is noted on the marker of the movement that had filled the bucket, for a dispute that is won later.

-- Returns the payments, which are { payer, debt, amount }.
local function pay_debts(keys, buckets, gateway_now)
  local payments = {}
  for _, debt in ipairs(buckets) do
    local owed = debt.is_line and 0 or -(debt.remaining + debt.held)
    for _, b in ipairs(owed > 0 and buckets or NONE) do
      local part = math.min(b.remaining, owed)
      if part > 0 and not b.is_allowance and b.unit == debt.unit and b.adapters == debt.adapters
        and is_live(b, gateway_now) then
        b.remaining, debt.remaining, owed = b.remaining - part, debt.remaining + part, owed - part
        b.is_changed, debt.is_changed = true, true
        payments[#payments + 1] = { payer = b.id, debt = debt.id, amount = part }
        local marker = keys.movements .. debt.id
        if redis.call("HEXISTS", marker, "content") == 1 then redis.call("HINCRBY", marker, "paid:" .. b.id, text(part)) end
      end
    end
  end
  return payments
end

-- Of an amount that came back into a bucket, give those theirs that had paid its debt, and so on. Adds to `payments`.
-- What the bucket still owes is settled first: a payment may have been for a clawback that stands, so giving back takes
-- no bucket below zero. Packs may have paid each other, so each note is read when its turn comes.
local function give_back(keys, buckets, b, amount, payments)
  local marker, payers = keys.movements .. b.id, {}
  for _, noted in ipairs(redis.call("HKEYS", marker)) do
    local id = string.match(noted, "^paid:(.*)$")
    local payer = id and find_bucket(keys, buckets, id)
    if payer then payers[#payers + 1] = payer end
  end
  table.sort(payers, is_drawn_before)
  for _, to in ipairs(payers) do
    local part = math.min(number_at(marker, "paid:" .. to.id), amount, math.max(0, b.remaining))
    if part > 0 then
      b.remaining, to.remaining, amount = b.remaining - part, to.remaining + part, amount - part
      b.is_changed, to.is_changed = true, true
      payments[#payments + 1] = { payer = to.id, debt = b.id, amount = -part }
      redis.call("HINCRBY", marker, "paid:" .. to.id, text(-part))
      give_back(keys, buckets, to, part, payments)
    end
  end
end

-- What refunds and disputes could not take from a grant, because it had not come or others had it, waits on the grant's
-- marker and is taken as soon as it is there: together they take what it gave, in any order. Returns the clawbacks.
local function take_owed(marker, b, buckets, gateway_now)
  local owed, clawbacks = redis.call("HGETALL", marker), {}
  for i = 1, #owed, 2 do
    local source = string.match(owed[i], "^owed:(.*)$")
    local taken = source and math.min(tonumber(owed[i + 1]), b.granted) or 0
    if taken > 0 then
      b.remaining, b.granted, b.is_changed = b.remaining - taken, b.granted - taken, true
      redis.call("HSET", marker, "owed:" .. source, text(tonumber(owed[i + 1]) - taken),
        "took:" .. source, text(number_at(marker, "took:" .. source) + taken))
      clawbacks[#clawbacks + 1] = { source = source, unit = b.unit, amount = taken, bucket = b.id,
        balance = balance_of(buckets, gateway_now, buckets.allowance) }
    end
  end
  return clawbacks
end

local function append_clawbacks(keys, tenant, clawbacks, now)
  for _, clawback in ipairs(clawbacks) do
    clawback.now = now
    append_movement(keys, "clawback", tenant, clawback)
  end
end
