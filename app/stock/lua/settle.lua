-- Take a stored batch out of the outbox, at most once.
--
-- KEYS  1 outbox   2 queued   3 generation   then the product hashes; then for each dead letter that
--       came with an Idempotency-Key: the keys of its bucket, and where 0.1.0 kept this key
-- ARGV  1 first id and 2 last id of the batch, a prefix of the outbox   3 the sale it was read from
--       4 number of orders   5 number of product hashes   then the order ids; then for each product
--       hash: orders, units, persisted; then for each dead letter: field of the key, the key's record
--       while the order stands, the same as 0.1.0 wrote it, and its record from now on
-- Returns 1, or 0 when the outbox no longer begins with this batch (somebody settled it already), or
-- belongs to another sale, whose ids start from 1 again.

if redis.call('GET', KEYS[3]) ~= ARGV[3] then return 0 end

local head = redis.call('XRANGE', KEYS[1], '-', '+', 'COUNT', 1)[1]
if not head or head[1] ~= ARGV[1] then return 0 end

local last = 5 + tonumber(ARGV[4])
for start = 6, last, 1000 do -- unpack() has room for about 8,000 values
  redis.call('ZREM', KEYS[2], unpack(ARGV, start, math.min(start + 999, last)))
end
local at, letters = last + 1, 4 + tonumber(ARGV[5])
for product = 4, letters - 1 do
  if redis.call('HEXISTS', KEYS[product], 'free') == 1 then
    redis.call('HINCRBY', KEYS[product], 'settled', ARGV[at])
    redis.call('HINCRBY', KEYS[product], 'settled_units', ARGV[at + 1])
    redis.call('HINCRBY', KEYS[product], 'persisted', ARGV[at + 2])
  end
  at = at + 3
end
-- A replay of the purchase is to say that its order failed, unless somebody has decided since.
for letter = letters, #KEYS, 2 do
  local record = redis.call('HGET', KEYS[letter], ARGV[at])
  if record == ARGV[at + 1] or not record and redis.call('GET', KEYS[letter + 1]) == ARGV[at + 2] then
    redis.call('HSET', KEYS[letter], ARGV[at], ARGV[at + 3])
  end
  at = at + 4
end
-- MINID keeps what is at or above it; whole nodes go at once, so this costs next to nothing.
redis.call('XTRIM', KEYS[1], 'MINID', '=', string.match(ARGV[2], '^%d+') .. '-1')
return 1
