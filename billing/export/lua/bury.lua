-- Moves one event between the outbox and the dead letters, whichever way, and counts it.
-- KEYS: cursor, hash it leaves, hash it enters
-- ARGV: id, event, events (1 buries, -1 revives), charge nanos, covered nanos (with that sign)
-- Returns 1 if it was there.
if redis.call('HDEL', KEYS[2], ARGV[1]) == 0 then
  return 0
end
redis.call('HSET', KEYS[3], ARGV[1], ARGV[2])
redis.call('HINCRBY', KEYS[1], 'dead_events', ARGV[3])
redis.call('HINCRBY', KEYS[1], 'dead_charge', ARGV[4])
redis.call('HINCRBY', KEYS[1], 'dead_covered', ARGV[5])
return 1
