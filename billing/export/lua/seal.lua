-- Move the export cursor and write what was folded up to it, or do nothing at all.
-- writes: yes
-- keys: cursor outbox withheld accounts[]
-- args: expected after entries charge covered reached[] events[id event] held_back[id entry]
-- returns: 1 if sealed, 0 if another exporter moved the cursor first
-- `reached` says how far the tenant of each account was sealed; what is charged and covered is in nanos.

if (redis.call("HGET", keys.cursor, "at") or "0-0") ~= expected then return 0 end
for i, account in ipairs(keys.accounts) do redis.call("HSET", account, "told", reached[i]) end
for _, one in ipairs(events) do redis.call("HSET", keys.outbox, one.id, one.event) end
for _, one in ipairs(held_back) do redis.call("HSET", keys.withheld, one.id, one.entry) end
redis.call("HSET", keys.cursor, "at", after)
redis.call("HINCRBY", keys.cursor, "sealed_entries", entries)
redis.call("HINCRBY", keys.cursor, "sealed_events", #events)
redis.call("HINCRBY", keys.cursor, "sealed_charge", charge)
redis.call("HINCRBY", keys.cursor, "sealed_covered", covered)
return 1
