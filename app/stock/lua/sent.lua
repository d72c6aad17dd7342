-- What was lent a while ago and is not done: whoever was at it may have died.
--
-- KEYS  1 generation   2 sent
-- ARGV  1 the sale, as it is named here   2 how old an entry is at least, in ms   3 how many at most
-- Returns of each entry {number, shard that gets it, product id, units}.

if redis.call('GET', KEYS[1]) ~= ARGV[1] then return {} end
local time, found = redis.call('TIME'), {}
local latest = time[1] * 1000 + math.floor(time[2] / 1000) - ARGV[2]
for _, entry in ipairs(redis.call('XRANGE', KEYS[2], '-', '+', 'COUNT', ARGV[3])) do
  local to, product, units, at = string.match(entry[2][2], '^(%d+) (%d+) (%d+) (%d+)$')
  if tonumber(at) <= latest then
    found[#found + 1] = { tonumber(string.match(entry[1], '^%d+')), tonumber(to), tonumber(product), tonumber(units) }
  end
end
return found
