-- Take events that Dodo has out of the outbox and count each once.
-- writes: yes
-- keys: cursor outbox
-- args: events[id charge covered]
-- returns: how many were still there

local acked = 0
for _, event in ipairs(events) do
  if redis.call("HDEL", keys.outbox, event.id) == 1 then
    redis.call("HINCRBY", keys.cursor, "acked_events", 1)
    redis.call("HINCRBY", keys.cursor, "acked_charge", event.charge)
    redis.call("HINCRBY", keys.cursor, "acked_covered", event.covered)
    acked = acked + 1
  end
end
return acked
