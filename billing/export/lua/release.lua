-- Seals one entry that was withheld and is as it was written again.
-- KEYS: cursor, outbox, withheld
-- ARGV: entry, events, charge nanos, covered nanos, then id, event ...
-- Returns 1 if it was still there.
if redis.call('HDEL', KEYS[3], ARGV[1]) == 0 then
  return 0
end
for i = 5, #ARGV, 2 do
  redis.call('HSET', KEYS[2], ARGV[i], ARGV[i + 1])
end
redis.call('HINCRBY', KEYS[1], 'sealed_entries', 1)
redis.call('HINCRBY', KEYS[1], 'sealed_events', ARGV[2])
redis.call('HINCRBY', KEYS[1], 'sealed_charge', ARGV[3])
redis.call('HINCRBY', KEYS[1], 'sealed_covered', ARGV[4])
return 1
