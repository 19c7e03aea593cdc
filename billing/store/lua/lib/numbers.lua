-- Amounts travel and rest as decimal strings: Lua writes large numbers as 1e+15 and keeps 53 bits.

local function text(number)
  if number == 0 then return "0" end -- never "-0"
  return string.format("%.0f", number)
end

local function number_at(key, field)
  return tonumber(redis.call("HGET", key, field) or "0")
end
