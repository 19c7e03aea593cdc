-- Move the leases of one shard's running requests forward and note how far each has come.
-- Returns the ids that are no longer held: those must stop.

local now, gone = store_ms(), {}
for i = 1, #ARGV, 3 do
  local id, usage, list = ARGV[i], ARGV[i + 1], ARGV[i + 2]
  local open = redis.call("HGET", KEYS[1], id)
  if open then
    local hold = cjson.decode(open)
    if tonumber(list) >= tonumber(hold.list) then -- an older one that arrives late changes nothing
      hold.usage, hold.list = usage, list
      redis.call("HSET", KEYS[1], id, cjson.encode(hold))
    end
    redis.call("ZADD", KEYS[2], "XX", text(now + tonumber(hold.lease)), id)
  else
    gone[#gone + 1] = id
  end
end
return gone
