-- Say that units of a product have come to some shard: claims ask for them at once.
--
-- KEYS  1 product   2 lent
-- Returns nothing. To miss this costs at most the rest of a seal's time.

redis.set_repl(redis.REPL_NONE)
redis.call('HINCRBY', KEYS[2], 'unseals', 1)
redis.call('HDEL', KEYS[1], 'sealed')
