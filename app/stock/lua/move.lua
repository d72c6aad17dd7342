-- Apply one stock movement, at most once.
--
-- KEYS  1 generation   2 movements (a bit for each applied one)   3 product   4 bought (only for a
--       return), and with it, only of an order that came with a key:   5 keys   6 where 0.1.0 kept it
-- ARGV  1 movement id  2 units, negative to take away             3 the sale that it belongs to
--       4 field of the user in KEYS[4]   5 field of the key in KEYS[5]   6 order id   7 its status, + for
--       one that stands again
-- Returns {outcome, free stock}: applied | repeated | short | capped | unknown | unprepared.

if redis.call('GET', KEYS[1]) ~= ARGV[3] then return { 'unprepared', 0 } end
local free = tonumber(redis.call('HGET', KEYS[3], 'free'))
if not free then return { 'unknown', 0 } end
if redis.call('GETBIT', KEYS[2], ARGV[1]) == 1 then return { 'repeated', free } end
local units = tonumber(ARGV[2])
if units < 0 and free + units < 0 then return { 'short', free } end
-- Who takes units again, by paying late, does so under the product's cap.
if units < 0 and KEYS[4] then
  local cap = tonumber(redis.call('HGET', KEYS[3], 'cap') or '')
  local bought = tonumber(redis.call('HGET', KEYS[4], ARGV[4]) or 0)
  if cap and bought - units > cap then return { 'capped', free } end
end

redis.call('SETBIT', KEYS[2], ARGV[1], 1)
redis.call('HINCRBY', KEYS[3], 'free', units)
redis.call('HINCRBY', KEYS[3], 'moved', units)
-- Who gives units back may buy again under the product's cap.
if KEYS[4] and redis.call('HINCRBY', KEYS[4], ARGV[4], -units) <= 0 then
  redis.call('HDEL', KEYS[4], ARGV[4])
end
-- A replay of the purchase is to say what has become of its order: see claim.lua for the record.
if KEYS[5] then
  local record = redis.call('HGET', KEYS[5], ARGV[5])
  local former = not record and redis.call('GET', KEYS[6])
  local id, price, request
  if record then id, price, request = string.match(record, '^(%d+) (%S+ %S+) %S+ (.+)$')
  elseif former then
    id, request = string.match(former, '^(%d+) (.+)$')
    price = '- -'
  end
  if id == ARGV[6] then
    redis.call('HSET', KEYS[5], ARGV[5], table.concat({ id, price, ARGV[7], request }, ' '))
    redis.call('DEL', KEYS[6])
  end
end
return { 'applied', free + units }
