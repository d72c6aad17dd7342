-- What Redis holds of the sale, at one instant: the Redis half of every figure and of the ledger.
--
-- KEYS  1 generation   2 movements   3 outbox   4 order ids   5 brakes   6.. product hashes
-- ARGV  1 the last order id known to be stored ('' for none)   2.. ids of movements asked about
-- Returns {generation, order id counter, waiting orders, first waiting entry, movement ids applied,
--          entries up to the id in ARGV[1] that are still here, brakes, a hash as a flat list per
--          product}.

local applied = {}
for i = 2, #ARGV do
  if redis.call('GETBIT', KEYS[2], ARGV[i]) == 1 then applied[#applied + 1] = ARGV[i] end
end
local overlap = {}
if ARGV[1] ~= '' then
  for _, entry in ipairs(redis.call('XRANGE', KEYS[3], '-', ARGV[1] .. '-0')) do
    overlap[#overlap + 1] = entry[2][2]
  end
end
local products = {}
for i = 6, #KEYS do products[#products + 1] = redis.call('HGETALL', KEYS[i]) end
local head = redis.call('XRANGE', KEYS[3], '-', '+', 'COUNT', 1)[1]
return {
  redis.call('GET', KEYS[1]) or '',
  redis.call('GET', KEYS[4]) or '0',
  redis.call('XLEN', KEYS[3]),
  head and head[2][2] or '',
  applied,
  overlap,
  redis.call('GET', KEYS[5]) or '',
  products,
}
