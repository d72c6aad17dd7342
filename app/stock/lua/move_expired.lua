-- Apply one movement that brings back the units of many orders which ended together, at most once.
--
-- KEYS  1 generation   2 movements (a bit for each applied one)   3 product   then bought (buckets of
--       users); then the keys of buckets
-- ARGV  1 movement id   2 units   3 the sale that it belongs to   4 how many keys are bought; then
--       for each of them how many users follow, their fields, and the units of each; for each of the
--       other keys how many pairs follow: a key's field and its record from now on
-- Returns {outcome, free stock}: applied | repeated | unknown | unprepared.

if redis.call('GET', KEYS[1]) ~= ARGV[3] then return { 'unprepared', 0 } end
local free = tonumber(redis.call('HGET', KEYS[3], 'free'))
if not free then return { 'unknown', 0 } end
if redis.call('GETBIT', KEYS[2], ARGV[1]) == 1 then return { 'repeated', free } end

redis.call('SETBIT', KEYS[2], ARGV[1], 1)
redis.call('HINCRBY', KEYS[3], 'free', ARGV[2])
redis.call('HINCRBY', KEYS[3], 'moved', ARGV[2])
-- A bucket is read, and written, at once: 100,000 holds may end in a second. (There are at most 1,000
-- orders; unpack() has room for about 8,000 values.)
local at = 5
for i = 4, 3 + tonumber(ARGV[4]) do
  local users = tonumber(ARGV[at])
  local bought = redis.call('HMGET', KEYS[i], unpack(ARGV, at + 1, at + users))
  local none, left = {}, {}
  for user = 1, users do
    local field = ARGV[at + user]
    local units = (tonumber(bought[user]) or 0) - ARGV[at + users + user]
    if units > 0 then
      left[#left + 1] = field
      left[#left + 1] = units
    else
      none[#none + 1] = field
    end
  end
  if #none > 0 then redis.call('HDEL', KEYS[i], unpack(none)) end
  if #left > 0 then redis.call('HSET', KEYS[i], unpack(left)) end
  at = at + 2 * users + 1
end
-- A (user, key) pair has one order, ever: its record is this order's.
for i = 4 + tonumber(ARGV[4]), #KEYS do
  local pairs = tonumber(ARGV[at])
  redis.call('HSET', KEYS[i], unpack(ARGV, at + 1, at + 2 * pairs))
  at = at + 2 * pairs + 1
end
return { 'applied', free + ARGV[2] }
