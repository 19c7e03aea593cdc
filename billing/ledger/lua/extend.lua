-- Raise one open hold to a total, in one step that changes all or nothing.
-- include: store/numbers ledger/buckets ledger/waterfall ledger/caps
-- writes: yes
-- keys: account buckets holds
-- args: id tenant total:nanos least:nanos gateway_now:ms
-- reply: held nanos | unknown | insufficient balance available held | on_hold balance available held
--   | capped window start nanos spent held | cap_on_hold window start nanos spent held
-- Where there is less than the total, it draws all there is, if that comes to the least. A total that is held already
-- changes nothing, so a repeat draws nothing twice, and one that comes after the settle finds no hold.

local open = redis.call("HGET", keys.holds, id)
if not open then return { "unknown" } end
local hold = cjson.decode(open)
if hold.tenant ~= tenant then return { "unknown" } end
if hold.draws[1] and hold.draws[1][2] == "r" then return { "held", hold.draws[1][3] } end
local held = nanos_of(hold.draws)
if held >= total then return { "held", text(held) } end

-- The allowance in force, and not that of the hold: its period may be over.
local buckets = read_buckets(keys)
local policy = policy_available(gateway_now, buckets.allowance or hold.allowance, tonumber(hold.cap))
local there = reach(buckets, policy, hold.draws)
if held + there.available < least then return refusal(there, least - held) end
local headroom = headroom_under(keys.account, hold.key, hold.caps, held)
if held + headroom.at_once < least then return cap_refusal(headroom, least) end
local amount = math.min(total - held, there.available, headroom.at_once)
if amount <= 0 then return { "held", text(held) } end
hold.draws = merged(buckets, { hold.draws, waterfall(buckets, amount, policy) })
redis.call("HSET", keys.holds, id, cjson.encode(hold))
write_buckets(keys, buckets)
count_under(keys.account, hold.key, hold.caps, amount, 0)
return { "held", text(held + amount) }
