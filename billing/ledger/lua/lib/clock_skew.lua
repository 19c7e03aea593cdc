-- How far ahead of the store's clock a gateway's may be.

local CLOCK_SKEW_MS = 300000 -- `billing.clock.TOLERANCE_MS`

-- The latest moment that any clock may show. What begins later was written by a clock that was wrong and is put right.
local function latest_of(now, gateway_now)
  return math.max(now, gateway_now) + CLOCK_SKEW_MS
end
