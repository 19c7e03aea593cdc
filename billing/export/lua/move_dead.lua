-- Move one event between the outbox and the dead letters, whichever way, and count it.
-- writes: yes
-- keys: cursor from to
-- args: id event events charge covered
-- returns: 1 if it was there
-- The counts are added to those of the dead letters: 1 event and its nanos, or the same below zero on the way back.

if redis.call("HDEL", keys.from, id) == 0 then return 0 end
redis.call("HSET", keys.to, id, event)
redis.call("HINCRBY", keys.cursor, "dead_events", events)
redis.call("HINCRBY", keys.cursor, "dead_charge", charge)
redis.call("HINCRBY", keys.cursor, "dead_covered", covered)
return 1
