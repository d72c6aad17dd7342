-- Note how many units may come back because their orders are held: for sold_out answers alone.
--
-- KEYS  1 generation   2.. product hashes
-- ARGV  1 the sale   then for each product: units of stored orders that are held
-- Returns 1, or 0 for another sale. What was claimed and is not stored counts where it is held, too.

if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
for i = 2, #KEYS do
  local claimed, settled, hold = unpack(redis.call('HMGET', KEYS[i], 'claimed', 'settled_units', 'hold'))
  if claimed then
    local waiting = tonumber(hold or '') and claimed - settled or 0
    redis.call('HSET', KEYS[i], 'held', ARGV[i] + waiting)
  end
end
return 1
