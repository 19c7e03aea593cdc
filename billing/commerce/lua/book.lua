-- Write one entry into the cash book, once per id. Its own id is the time of booking, by the store's clock.
-- writes: yes
-- keys: book booked
-- args: id entry
-- returns: 1 if it is new

if redis.call("HEXISTS", keys.booked, id) == 1 then return 0 end
redis.call("HSET", keys.booked, id, redis.call("XADD", keys.book, "*", "id", id, "e", entry))
return 1
