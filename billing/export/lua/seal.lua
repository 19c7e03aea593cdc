-- Moves the export cursor and writes what was folded up to it, or does nothing at all.
-- KEYS: cursor, outbox, withheld, then the account of each tenant in the window
-- ARGV: cursor expected, cursor after, entries, events, charge nanos, covered nanos, then what each of those accounts
-- has reached, then id, event ..., then id, entry withheld ...
-- Returns 1 if sealed, 0 if another exporter moved the cursor first.
local cursor, outbox, withheld = KEYS[1], KEYS[2], KEYS[3]
if (redis.call('HGET', cursor, 'at') or '0-0') ~= ARGV[1] then
  return 0
end
local first = 7 + #KEYS - 3
local last = first + 2 * tonumber(ARGV[4]) - 1
for i = 4, #KEYS do
  redis.call('HSET', KEYS[i], 'told', ARGV[3 + i])
end
for i = first, last, 2 do
  redis.call('HSET', outbox, ARGV[i], ARGV[i + 1])
end
for i = last + 1, #ARGV, 2 do
  redis.call('HSET', withheld, ARGV[i], ARGV[i + 1])
end
redis.call('HSET', cursor, 'at', ARGV[2])
redis.call('HINCRBY', cursor, 'sealed_entries', ARGV[3])
redis.call('HINCRBY', cursor, 'sealed_events', ARGV[4])
redis.call('HINCRBY', cursor, 'sealed_charge', ARGV[5])
redis.call('HINCRBY', cursor, 'sealed_covered', ARGV[6])
return 1
