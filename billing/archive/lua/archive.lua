-- Move the archive cursor and note each tenant's last archived link, or do nothing at all.
-- writes: yes
-- keys: cursor archived
-- args: expected after links[tenant link]
-- returns: 1 if moved, 0 if another archiver moved it first

if (redis.call("HGET", keys.cursor, "archived") or "0-0") ~= expected then return 0 end
for _, one in ipairs(links) do redis.call("HSET", keys.archived, one.tenant, one.link) end
redis.call("HSET", keys.cursor, "archived", after)
return 1
