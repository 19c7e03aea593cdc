-- Write one notice into the log unless the same was written before.
-- writes: yes
-- keys: log recorded
-- args: once notice at:ms remembered_from:ms kept:count
-- returns: 1 if it is new

if redis.call("ZSCORE", keys.recorded, once) then return 0 end
redis.call("ZREMRANGEBYSCORE", keys.recorded, "-inf", remembered_from)
redis.call("ZADD", keys.recorded, at, once)
redis.call("XADD", keys.log, "MAXLEN", "~", kept, "*", "n", notice)
return 1
