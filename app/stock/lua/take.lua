-- Lend free units to another shard: they leave this one as an entry, which is given to that one.
--
-- KEYS  1 generation   2 product   3 lent (what of the product was sent to and received from each
--       shard)   4 sends (a counter of entries)   5 sent (the entries that are not done yet)
-- ARGV  1 the sale, as it is named here   2 product id   3 the shard that gets them   4 what it lacks
-- Returns {outcome, number of the entry, units}: taken | none | unprepared. Half of what is free goes,
--         or more if more is lacking.

if redis.call('GET', KEYS[1]) ~= ARGV[1] then return { 'unprepared', 0, 0 } end
local free = tonumber(redis.call('HGET', KEYS[2], 'free') or 0)
if free <= 0 then return { 'none', 0, 0 } end
local units = math.min(free, math.max(math.ceil(free / 2), tonumber(ARGV[4])))
-- A key of another type is found before the first write.
redis.call('HLEN', KEYS[3])
redis.call('XLEN', KEYS[5])
local time = redis.call('TIME')
local now = string.format('%d', time[1] * 1000 + math.floor(time[2] / 1000))

local number = redis.call('INCR', KEYS[4])
redis.call('XADD', KEYS[5], number .. '-0', 'lent', table.concat({ ARGV[3], ARGV[2], units, now }, ' '))
redis.call('HINCRBY', KEYS[2], 'free', -units)
redis.call('HINCRBY', KEYS[3], 'sent.' .. ARGV[3], units)
return { 'taken', number, units }
