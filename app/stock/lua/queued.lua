-- A shopper's orders that wait in the outbox, seen at one instant.
--
-- KEYS  1 queued   2 outbox
-- ARGV  1 score of the user, which others may share   2 the user   3 at most so many, the newest
-- Returns a list of {order id, entry}, newest first.

local orders = {}
for _, id in ipairs(redis.call('ZREVRANGEBYSCORE', KEYS[1], ARGV[1], ARGV[1])) do
  orders[#orders + 1] = tonumber(id)
end
-- Members of one score are ordered as text ("9" above "10"): put them in order of number.
table.sort(orders, function(a, b) return a > b end)
local found = {}
for i = 1, #orders do
  if #found == tonumber(ARGV[3]) then break end
  local id = string.format('%d', orders[i])
  local entry = redis.call('XRANGE', KEYS[2], id .. '-0', id .. '-0')[1]
  if entry then
    local first, second = string.match(entry[2][2], '^(%S+) (%S+) ')
    if (first == 'v2' and second or first) == ARGV[2] then found[#found + 1] = { id, entry[2][2] } end
  end
end
return found
