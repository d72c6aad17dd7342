-- Apply one movement that brings back the units of many orders which ended together, at most once.
--
-- KEYS  1 generation   2 movements (a bit for each applied one)   3 product   then bought (buckets of
--       users); then the keys of buckets
-- ARGV  1 movement id   2 units   3 the sale that it belongs to   4 how many keys are bought; then
--       for each key how many pairs follow, and these: user's field and units, or a key's field and
--       its record from now on
-- Returns {outcome, free stock}: applied | repeated | unknown | unprepared.

if redis.call('GET', KEYS[1]) ~= ARGV[3] then return { 'unprepared', 0 } end
local free = tonumber(redis.call('HGET', KEYS[3], 'free'))
if not free then return { 'unknown', 0 } end
if redis.call('GETBIT', KEYS[2], ARGV[1]) == 1 then return { 'repeated', free } end

redis.call('SETBIT', KEYS[2], ARGV[1], 1)
redis.call('HINCRBY', KEYS[3], 'free', ARGV[2])
redis.call('HINCRBY', KEYS[3], 'moved', ARGV[2])
local at = 5
for i = 4, 3 + tonumber(ARGV[4]) do
  for pair = 1, tonumber(ARGV[at]) do
    local field = ARGV[at + 2 * pair - 1]
    if redis.call('HINCRBY', KEYS[i], field, -ARGV[at + 2 * pair]) <= 0 then
      redis.call('HDEL', KEYS[i], field)
    end
  end
  at = at + 2 * ARGV[at] + 1
end
-- A (user, key) pair has one order, ever: its record is this order's.
for i = 4 + tonumber(ARGV[4]), #KEYS do
  local pairs = tonumber(ARGV[at])
  for start = at + 1, at + 2 * pairs, 2000 do -- unpack() has room for about 8,000 values
    redis.call('HSET', KEYS[i], unpack(ARGV, start, math.min(start + 1999, at + 2 * pairs)))
  end
  at = at + 2 * pairs + 1
end
return { 'applied', free + ARGV[2] }
