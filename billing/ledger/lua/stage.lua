-- Put a whole answer beside its claim before it is charged; without a kind, only ask whether the claim still stands.

local answer, request, kind, body = KEYS[1], ARGV[1], ARGV[2], ARGV[3]
if redis.call("HGET", answer, "request") ~= request then return 0 end
if kind ~= "" then redis.call("HSET", answer, "kind", kind, "answer", body) end
return 1
