-- This period's allowance, put in place once: under its id it is never filled again.
-- include: ledger/buckets

-- Returns the id of the allowance that counts. `former` is the id that this period's allowance may have from the version
-- before, which named no plan in it: then that one counts until the period is over, or there would be two. An allowance
-- ends with its period, which a pause of the subscription puts off.
local function put_allowance(keys, buckets, id, value, former)
  if id == "" then return "" end
  local given, live = parse_bucket(id, value), by_id(buckets)
  local b = live[id] or live[former] or former ~= "" and find_bucket(keys, buckets, former) or find_bucket(keys, buckets, id)
  if not b then
    b = add_bucket(buckets, given)
    b.is_changed = true
  end
  if b.was_retired then b.is_changed = true end
  if b.expires < given.expires then
    b.expires, b.is_changed = given.expires, true
    table.sort(buckets, is_drawn_before)
  end
  return b.id
end
