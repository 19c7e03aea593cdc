-- Drawing money for a request: in the buckets' order, the rest from exposure. For hold.lua and extend.lua.

local function is_drawable(b, calendar, allowance_id)
  return is_live(b, calendar) and (not b.is_allowance or b.id == allowance_id)
end

local function spendable(money, credit)
  return money < 0 and money or money + credit
end

-- What there is for a request that holds `own` already: what it could draw now, and what if all others
-- gave back theirs. The buckets must be sorted.
local function purse_of(account, buckets, funding, own)
  local overage, overage_held = number_at(account, "overage"), number_at(account, "overage_held")
  local mine, balance, others = {}, 0, 0
  for _, draw in ipairs(own) do mine[draw[1]] = tonumber(draw[3]) end
  local drawable = {}
  for _, b in ipairs(buckets) do
    if b.unit == "n" and is_drawable(b, funding.calendar, funding.allowance_id) then
      drawable[#drawable + 1] = b
      balance, others = balance + b.remaining, others + b.held - (mine[b.id] or 0)
    end
  end
  local cap = funding.cap - overage
  return {
    drawable = drawable, balance = balance, held = others + overage_held - (mine.overage or 0),
    overage_held = overage_held, available = spendable(balance, math.max(0, cap - overage_held)),
    potential = spendable(balance + others, math.max(0, cap - (mine.overage or 0))),
  }
end

-- Take an amount that is available; returns by bucket what was taken, and from exposure.
local function draw_money(purse, amount)
  local draws, rest = {}, math.min(amount, purse.balance)
  local overage = amount - rest
  for _, b in ipairs(purse.drawable) do
    if rest > 0 and b.remaining > 0 then
      local part = math.min(b.remaining, rest)
      b.remaining, b.held, b.is_changed = b.remaining - part, b.held + part, true
      rest, purse.balance = rest - part, purse.balance - part
      draws[#draws + 1] = { b.id, "n", text(part) }
    end
  end
  if overage > 0 then draws[#draws + 1] = { "overage", "n", text(overage) } end
  return draws, overage
end

local function refusal(purse, needed)
  local code = purse.potential >= needed and "on_hold" or "insufficient"
  return { code, text(purse.balance), text(purse.available), text(purse.held) }
end
