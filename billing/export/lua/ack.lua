-- Takes events that Dodo has out of the outbox and counts each once.
-- KEYS: cursor, outbox
-- ARGV: id, charge nanos, covered nanos, ...
-- Returns how many were still there.
local acked = 0
for i = 1, #ARGV, 3 do
  if redis.call('HDEL', KEYS[2], ARGV[i]) == 1 then
    redis.call('HINCRBY', KEYS[1], 'acked_events', 1)
    redis.call('HINCRBY', KEYS[1], 'acked_charge', ARGV[i + 1])
    redis.call('HINCRBY', KEYS[1], 'acked_covered', ARGV[i + 2])
    acked = acked + 1
  end
end
return acked
