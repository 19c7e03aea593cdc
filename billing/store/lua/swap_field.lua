-- Replace a field of a hash only where it is still what its writer had read.
-- writes: yes
-- keys: hash
-- args: field old new
-- returns: 1 if replaced

if redis.call("HGET", keys.hash, field) ~= old then return 0 end
redis.call("HSET", keys.hash, field, new)
return 1
