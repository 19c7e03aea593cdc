-- Replace a value only where it is still what its writer had read. Again, after a lost reply, it finds its own value.
-- writes: yes
-- keys: value
-- args: old new
-- returns: 1 if the new value is there

local found = redis.call("GET", keys.value)
if found == new then return 1 end
if found ~= old then return 0 end
redis.call("SET", keys.value, new)
return 1
