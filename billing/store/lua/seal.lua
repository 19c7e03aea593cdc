-- Moves the export cursor and writes what was folded up to it, or does nothing at all.
-- KEYS: cursor, outbox
-- ARGV: cursor expected, cursor after, entries, events, charge nanos, covered nanos, then id, event ...
-- Returns 1 if sealed, 0 if another exporter moved the cursor first.
local cursor, outbox = KEYS[1], KEYS[2]
if (redis.call('HGET', cursor, 'at') or '0-0') ~= ARGV[1] then
  return 0
end
for i = 7, #ARGV, 2 do
  redis.call('HSET', outbox, ARGV[i], ARGV[i + 1])
end
redis.call('HSET', cursor, 'at', ARGV[2])
redis.call('HINCRBY', cursor, 'sealed_entries', ARGV[3])
redis.call('HINCRBY', cursor, 'sealed_events', ARGV[4])
redis.call('HINCRBY', cursor, 'sealed_charge', ARGV[5])
redis.call('HINCRBY', cursor, 'sealed_covered', ARGV[6])
return 1
