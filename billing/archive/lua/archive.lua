-- Moves the archive cursor and notes each tenant's last archived link, or does nothing at all.
-- KEYS: cursor, archived links
-- ARGV: cursor expected, cursor after, then tenant, link ...
-- Returns 1 if moved, 0 if another archiver moved it first.
if (redis.call('HGET', KEYS[1], 'archived') or '0-0') ~= ARGV[1] then
  return 0
end
for i = 3, #ARGV, 2 do
  redis.call('HSET', KEYS[2], ARGV[i], ARGV[i + 1])
end
redis.call('HSET', KEYS[1], 'archived', ARGV[2])
return 1
