-- Say that units of a product have come to some shard: claims ask for them at once.
--
-- KEYS  1 product   2 lent
-- Returns nothing. Kept in memory alone, as seals are: to miss it costs at most the rest of a seal's time.

redis.set_repl(redis.REPL_NONE)
local time = redis.call('TIME')
redis.call('HSET', KEYS[2], 'unsealed', time[1] .. string.format('%06d', time[2]))
redis.call('HDEL', KEYS[1], 'sealed')
