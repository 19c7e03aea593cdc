-- Note a send in events before it happens; those acknowledged meanwhile stay gone.
-- writes: yes
-- keys: outbox
-- args: events[id event]
-- returns: 1

for _, one in ipairs(events) do
  if redis.call("HEXISTS", keys.outbox, one.id) == 1 then redis.call("HSET", keys.outbox, one.id, one.event) end
end
return 1
