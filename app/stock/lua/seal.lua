-- Note for a while that no shard in reach has any of a product left, so that claims need not ask.
--
-- KEYS  1 generation   2 product   3 lent
-- ARGV  1 the sale, as it is named here   2 when the product had been unsealed here, as the scan read it
--       (0 for never)   3 ms since 1970 until when it is sealed; away follows if a shard was out of reach
-- Returns 1, or 0 when it has been unsealed since. Kept in memory alone, as refusals are.

redis.set_repl(redis.REPL_NONE)
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
if (redis.call('HGET', KEYS[3], 'unsealed') or '0') ~= ARGV[2] then return 0 end
redis.call('HSET', KEYS[2], 'sealed', ARGV[3])
return 1
