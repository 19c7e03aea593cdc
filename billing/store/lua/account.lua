-- A tenant's account and buckets as of one moment.

return { redis.call("HMGET", KEYS[1], "seq", "open", "overage", "overage_held"), redis.call("HGETALL", KEYS[2]) }
