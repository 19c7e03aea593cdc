-- Put a whole answer beside its claim before it is charged.
-- writes: yes
-- keys: answer
-- args: request kind body
-- returns: 1 if the claim still stands
-- Without a kind it only asks that.

if redis.call("HGET", keys.answer, "request") ~= request then return 0 end
if kind ~= "" then redis.call("HSET", keys.answer, "kind", kind, "answer", body) end
return 1
