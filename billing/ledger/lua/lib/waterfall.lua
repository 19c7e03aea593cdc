-- What may be drawn for a request, and the drawing of it: one waterfall under three policies.
-- include: store/numbers ledger/buckets
--
-- A policy says which buckets count and how far each may be drawn:
--   available  A hold, an extension and a late settle draw what is there: never below zero, nor what pays a debt.
--   call       One call of a bucket of requests pays for the whole request. No credit line stands behind calls.
--   owed       What the store has lost of a hold is drawn again when it ends. Its settle may have been acknowledged before,
--              and then that receipt must stand. So buckets of the hold count though they ended since, debts, which came
--              after it, count for nothing, and what others have drawn meanwhile is owed by the last bucket of the hold:
--              a pack goes below zero, the credit line beyond its limit.

-- `allowance`: the one that counts, "" for none, nil for any. `limit`: of the credit line.
local function policy_available(gateway_now, allowance, limit)
  return { unit = "n", gateway_now = gateway_now, allowance = allowance, limit = limit, keeps_debts = true, own = {} }
end

-- Buckets that cover `model`; a late settle draws `only` on the bucket that its hold had drawn on.
local function policy_call(gateway_now, allowance, model, only)
  return { unit = "r", gateway_now = gateway_now, allowance = allowance, keeps_debts = true, own = {}, model = model,
    only = only }
end

-- `drawn`: ids of the hold's buckets in drawing order. Calls are owed by that bucket alone.
local function policy_owed(unit, gateway_now, allowance, limit, drawn)
  local own, last = {}, drawn[#drawn]
  for _, id in ipairs(drawn) do own[id] = true end
  return { unit = unit, gateway_now = gateway_now, allowance = allowance, limit = limit, own = own, owes = last,
    only = unit == "r" and last or nil }
end

local function covers(b, model)
  return not model or b.adapters == "" or string.find("," .. b.adapters .. ",", "," .. model .. ",", 1, true)
end

local function is_drawable(b, policy)
  if b.unit ~= policy.unit or policy.only and b.id ~= policy.only or not covers(b, policy.model) then return false end
  if b.is_line or b.remaining < 0 or policy.own[b.id] then return true end -- what is owed does not expire
  return is_live(b, policy.gateway_now) and (not b.is_allowance or not policy.allowance or b.id == policy.allowance)
end

-- What is there for a hold with these draws: `money` in buckets; what others have `held`; what is `available` now; and
-- the `potential`, were all others to give back theirs. Credit is extended to no tenant in debt.
local function reach(buckets, policy, draws)
  local mine, money, others, credit, others_credit = {}, 0, 0, 0, 0
  for _, draw in ipairs(draws) do mine[draw[1]] = tonumber(draw[3]) end
  for _, b in ipairs(buckets) do
    if is_drawable(b, policy) then
      local held = b.held - (mine[b.id] or 0)
      if b.is_line then
        credit, others_credit = policy.limit + b.remaining, held
      else
        money, others = money + b.remaining, others + held
      end
    end
  end
  local function with(nanos, on_credit)
    return nanos < 0 and nanos or nanos + math.max(0, on_credit)
  end
  return { money = money, held = others + others_credit, available = with(money, credit),
    potential = with(money + others, credit + others_credit) }
end

local function balance_of(buckets, gateway_now, allowance)
  return reach(buckets, policy_available(gateway_now, allowance, 0), {}).money
end

-- Draws of the same buckets as one, in drawing order: in that order they are charged.
local function merged(buckets, all)
  local parts, rows = {}, {}
  for _, draws in ipairs(all) do
    for _, draw in ipairs(draws) do parts[draw[1]] = (parts[draw[1]] or 0) + tonumber(draw[3]) end
  end
  for _, b in ipairs(buckets) do
    if parts[b.id] then rows[#rows + 1] = { b.id, b.unit, text(parts[b.id]) } end
  end
  return rows
end

-- Draw an amount, or as much of it as the policy allows: from `remaining` to `held`. Returns the draws, which are
-- { bucket, unit, amount }.
local function waterfall(buckets, amount, policy)
  local draws, rest = {}, amount
  local spare = policy.keeps_debts and reach(buckets, policy, {}).money or math.huge -- what debts leave of the buckets
  local function take(b, part)
    if part <= 0 then return end
    b.remaining, b.held, b.is_changed = b.remaining - part, b.held + part, true
    rest = rest - part
    draws[#draws + 1] = { b.id, b.unit, text(part) }
  end
  for _, b in ipairs(buckets) do
    if is_drawable(b, policy) and b.is_line then
      if spare >= 0 then take(b, math.min(rest, policy.limit + b.remaining)) end
    elseif is_drawable(b, policy) then
      local before = rest
      take(b, math.min(b.remaining, rest, spare))
      spare = spare - (before - rest)
    end
  end
  if policy.owes then take(by_id(buckets)[policy.owes], rest) end
  return merged(buckets, { draws })
end

local function nanos_of(draws)
  local sum = 0
  for _, draw in ipairs(draws) do
    if draw[2] == "n" then sum = sum + tonumber(draw[3]) end
  end
  return sum
end

-- Why a request that needs so much is refused.
local function refusal(there, needed)
  local state = there.potential >= needed and "on_hold" or "insufficient"
  return { state, text(there.money), text(there.available), text(there.held) }
end
