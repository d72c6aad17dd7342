-- What this shard has of a product, at one instant, for another that has none left.
--
-- KEYS  1 generation   2 product   3 lent   4 sent
-- ARGV  1 the sale, as it is named here   2 product id   3 how old an entry is that is late, in ms
-- Returns nothing of another sale, else {ms since 1970, free, moved, lent as a flat list, shards that
--         entries of the product which are late are to be given to}.

if redis.call('GET', KEYS[1]) ~= ARGV[1] then return {} end
local time = redis.call('TIME')
local now, late = time[1] * 1000 + math.floor(time[2] / 1000), {}
-- More don't wait unless a shard can't be reached; the sweeper sees them all.
for _, entry in ipairs(redis.call('XRANGE', KEYS[4], '-', '+', 'COUNT', 100)) do
  local to, product, at = string.match(entry[2][2], '^(%d+) (%d+) %d+ (%d+)$')
  if product == ARGV[2] and now - at >= tonumber(ARGV[3]) then late[#late + 1] = tonumber(to) end
end
local free, moved = unpack(redis.call('HMGET', KEYS[2], 'free', 'moved'))
return { now, tonumber(free or 0), tonumber(moved or 0), redis.call('HGETALL', KEYS[3]), late }
