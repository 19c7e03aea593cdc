-- Store a webhook with what became of it, unless it is finished already: then what is stored stays.
-- writes: yes
-- keys: inbox
-- args: id delivery open[]
-- returns: 1 if it is stored
-- `open` are the outcomes that may still change.

local stored = redis.call("HGET", keys.inbox, id)
if not stored then return 0 end
local outcome = cjson.decode(stored).outcome
for _, one in ipairs(open) do
  if outcome == one then
    redis.call("HSET", keys.inbox, id, delivery)
    return 1
  end
end
return 0
