-- Replace a value only where it is still what its writer had read.
-- writes: yes
-- keys: value
-- args: old new
-- returns: 1 if replaced

if redis.call("GET", keys.value) ~= old then return 0 end
redis.call("SET", keys.value, new)
return 1
