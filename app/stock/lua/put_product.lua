-- Publish a product's terms of sale; a version already seen, or an older one, changes nothing.
--
-- KEYS  1 generation   2 products   3 product
-- ARGV  1 product id   2 version    3 opens ms   4 closes ms   5 pause 0|1   6 cap   7 max   8 price
--       9 hold, in seconds ('' where there is none)
-- Returns published | outdated | unprepared.

if redis.call('EXISTS', KEYS[1]) == 0 then return 'unprepared' end
local version = tonumber(redis.call('HGET', KEYS[3], 'version'))
if version and version >= tonumber(ARGV[2]) then return 'outdated' end
if not version then
  redis.call('HSET', KEYS[3], 'free', 0, 'moved', 0, 'accepted', 0, 'claimed', 0,
    'settled', 0, 'settled_units', 0, 'persisted', 0, 'held', 0)
end
redis.call('HSET', KEYS[3], 'version', ARGV[2], 'opens', ARGV[3], 'closes', ARGV[4], 'pause', ARGV[5],
  'cap', ARGV[6], 'max', ARGV[7], 'price', ARGV[8], 'hold', ARGV[9])
redis.call('SADD', KEYS[2], ARGV[1])
return 'published'
