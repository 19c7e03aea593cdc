-- Renew the leases of one shard's running requests and note how far each has come.
-- include: store/numbers store/clock ledger/waterfall
-- writes: yes
-- keys: holds leases
-- args: requests[id usage list:nanos held:nanos]
-- reply: renewed gone[]
-- `held` is what the gateway has of the hold: should the store have lost extensions, the hold is billed with them when its
-- lease ends. What is gone is no longer held and must stop.

local now, reply = store_ms(), { "renewed" }
for _, request in ipairs(requests) do
  local open = redis.call("HGET", keys.holds, request.id)
  if open then
    local hold = cjson.decode(open)
    if request.list >= tonumber(hold.list) then -- an older one that arrives late changes nothing
      hold.usage, hold.list = request.usage, text(request.list)
      if request.held > nanos_of(hold.draws) then hold.grown = text(request.held) end
      redis.call("HSET", keys.holds, request.id, cjson.encode(hold))
    end
    redis.call("ZADD", keys.leases, "XX", text(now + tonumber(hold.lease)), request.id)
  else
    reply[#reply + 1] = request.id
  end
end
return reply
