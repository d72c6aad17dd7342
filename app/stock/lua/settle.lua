-- Take a stored batch out of the outbox, at most once.
--
-- KEYS  1 outbox   2 queued   3 generation   4.. product hashes
-- ARGV  1 first id and 2 last id of the batch, a prefix of the outbox   3 the sale it was read from
--       4 number of orders, then the order ids, then for each product hash: orders, units, persisted
-- Returns 1, or 0 when the outbox no longer begins with this batch (somebody settled it already), or
-- belongs to another sale, whose ids start from 1 again.

if redis.call('GET', KEYS[3]) ~= ARGV[3] then return 0 end

local head = redis.call('XRANGE', KEYS[1], '-', '+', 'COUNT', 1)[1]
if not head or head[1] ~= ARGV[1] then return 0 end

local last = 4 + tonumber(ARGV[4])
for start = 5, last, 1000 do -- unpack() has room for about 8,000 values
  redis.call('ZREM', KEYS[2], unpack(ARGV, start, math.min(start + 999, last)))
end
local at = last + 1
for product = 4, #KEYS do
  if redis.call('HEXISTS', KEYS[product], 'free') == 1 then
    redis.call('HINCRBY', KEYS[product], 'settled', ARGV[at])
    redis.call('HINCRBY', KEYS[product], 'settled_units', ARGV[at + 1])
    redis.call('HINCRBY', KEYS[product], 'persisted', ARGV[at + 2])
  end
  at = at + 3
end
-- MINID keeps what is at or above it; whole nodes go at once, so this costs next to nothing.
redis.call('XTRIM', KEYS[1], 'MINID', '=', string.match(ARGV[2], '^%d+') .. '-1')
return 1
