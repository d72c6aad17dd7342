-- Correct a product's counters; its free stock is only ever lowered, and never below zero.
--
-- KEYS  1 generation   2 product
-- ARGV  1 the sale     2 units to take from the free stock   3.. pairs of field and amount to add
-- Returns the units really taken, or -1 when this is another sale or product.

if redis.call('GET', KEYS[1]) ~= ARGV[1] then return -1 end
local free = tonumber(redis.call('HGET', KEYS[2], 'free'))
local take = tonumber(ARGV[2])
if not free or take < 0 then return -1 end
take = math.max(math.min(take, free), 0)
redis.call('HSET', KEYS[2], 'free', free - take)
for i = 3, #ARGV, 2 do redis.call('HINCRBY', KEYS[2], ARGV[i], ARGV[i + 1]) end
return take
