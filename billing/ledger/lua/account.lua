-- A tenant's account and buckets as of one moment, and one allowance where that is retired.

local retired = redis.call("HGET", KEYS[3], ARGV[1]) or ""
return { redis.call("HMGET", KEYS[1], "seq", "open", "overage", "overage_held"), redis.call("HGETALL", KEYS[2]), retired }
