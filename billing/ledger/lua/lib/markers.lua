-- How long a settled request is remembered, so that the same settle counts once.
-- include: store/numbers
--
-- Marks lie in one hash per deduplication window, four hashes in turn. A mark is found during its own window and the two
-- after it, and outlives them by a tenth of one. After a failover the clock may have gone back: a mark of the window to come
-- counts as well. A mark is the id of the request's entry; that of an expired request is JSON, which a late settle needs.

local WINDOWS_REMEMBERED = 2 -- two fewer than `billing.store.keys.SETTLED_WINDOWS`

local function window_key(settled, window)
  return settled[window % #settled + 1]
end

local function find_mark(settled, id, now, window_ms)
  local window = math.floor(now / window_ms)
  for back = -1, WINDOWS_REMEMBERED do
    local key = window_key(settled, window - back)
    local value = redis.call("HGET", key, id)
    if value then return value, key end
  end
  return nil
end

local function mark(settled, id, value, now, window_ms)
  local window = math.floor(now / window_ms)
  local key = window_key(settled, window)
  redis.call("HSET", key, id, value)
  if redis.call("HLEN", key) > 1 then return end
  redis.call("PEXPIREAT", key, text(math.floor((window + WINDOWS_REMEMBERED + 1.1) * window_ms)))
end
