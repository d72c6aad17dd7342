-- Let a dead letter's order stand: a replay of its purchase is to tell it as stored.
--
-- KEYS  1 generation   2 outbox   3 keys   4 where 0.1.0 kept this key
-- ARGV  1 the sale   2 the letter's entry in the outbox   3 field of the key   4 its record
-- Returns done | waiting (a drain is still to take the entry out, and would say that it failed)
--         | unprepared (another sale, or a rebuild at work).

if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 'unprepared' end
if #redis.call('XRANGE', KEYS[2], ARGV[2], ARGV[2]) > 0 then return 'waiting' end
redis.call('HSET', KEYS[3], ARGV[3], ARGV[4])
redis.call('DEL', KEYS[4])
return 'done'
