-- Notes a send in events before it happens; those acknowledged meanwhile stay gone.
-- KEYS: outbox
-- ARGV: id, event, ...
for i = 1, #ARGV, 2 do
  if redis.call('HEXISTS', KEYS[1], ARGV[i]) == 1 then
    redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1])
  end
end
return 1
