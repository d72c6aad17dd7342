-- Take in units that another shard has lent to this one, at most once for each of its entries.
--
-- KEYS  1 generation   2 given (a bit for each entry of that shard)   3 product   4 lent
-- ARGV  1 the sale, as it is named here   2 the shard that sent them   3 number of the entry   4 units
-- Returns given | repeated | unknown (the product is not here) | unprepared. The name of the sale is
--         another on each shard and after each rebuild, so no entry is given elsewhere or later.

if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 'unprepared' end
if redis.call('HEXISTS', KEYS[3], 'free') == 0 then return 'unknown' end
if redis.call('GETBIT', KEYS[2], ARGV[3]) == 1 then return 'repeated' end
redis.call('HLEN', KEYS[4])

redis.call('SETBIT', KEYS[2], ARGV[3], 1)
redis.call('HINCRBY', KEYS[3], 'free', ARGV[4])
redis.call('HINCRBY', KEYS[4], 'recv.' .. ARGV[2], ARGV[4])
return 'given'
