-- Note how many units may come back because their orders are held: for sold_out answers alone.
--
-- KEYS  1 generation   2.. product hashes
-- ARGV  1 the sale   then for each product: units of stored orders that are held, and units that were
--       settled before PostgreSQL was asked for these
-- Returns 1, or 0 for another sale. What was claimed and not settled by then counts where it is held,
-- too: of what was settled meanwhile PostgreSQL may not have told.

if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
for i = 2, #KEYS do
  local claimed, hold = unpack(redis.call('HMGET', KEYS[i], 'claimed', 'hold'))
  if claimed then
    local held, settled = ARGV[2 * i - 2], ARGV[2 * i - 1]
    local waiting = tonumber(hold or '') and claimed - settled or 0
    redis.call('HSET', KEYS[i], 'held', held + waiting)
  end
end
return 1
