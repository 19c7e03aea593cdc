-- Writes one notice into the log unless the same was told before.
-- KEYS: log, told
-- ARGV: what it is about, notice, its time, forget what was told before, entries to keep
-- Returns its place in the log, or an empty string where it was told before.
if redis.call("ZSCORE", KEYS[2], ARGV[1]) then return "" end
redis.call("ZREMRANGEBYSCORE", KEYS[2], "-inf", ARGV[4])
redis.call("ZADD", KEYS[2], ARGV[3], ARGV[1])
return redis.call("XADD", KEYS[1], "MAXLEN", "~", ARGV[5], "*", "n", ARGV[2])
