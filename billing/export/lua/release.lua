-- Seal one entry that was withheld and is as it was written again.
-- writes: yes
-- keys: cursor outbox withheld
-- args: entry charge covered events[id event]
-- returns: 1 if it was still there

if redis.call("HDEL", keys.withheld, entry) == 0 then return 0 end
for _, one in ipairs(events) do redis.call("HSET", keys.outbox, one.id, one.event) end
redis.call("HINCRBY", keys.cursor, "sealed_entries", 1)
redis.call("HINCRBY", keys.cursor, "sealed_events", #events)
redis.call("HINCRBY", keys.cursor, "sealed_charge", charge)
redis.call("HINCRBY", keys.cursor, "sealed_covered", covered)
return 1
