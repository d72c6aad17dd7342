-- What Redis holds of the sale, and of so many of its products: the Redis half of every figure.
--
-- KEYS  1 generation   2 outbox   3 order ids   4 brakes   5.. product hashes
-- ARGV  1 'each' to be told every product, 'sums' for what all of them add up to
-- Returns {generation, order id counter, waiting orders, first waiting entry, brakes,
--          a hash as a flat list per product, or one such list with the sums}.

-- What can't be added up: how a product is sold, and until when it is refused by itself.
local TERMS = {
  version = 1, opens = 1, closes = 1, pause = 1, cap = 1, max = 1, price = 1, hold = 1, sealed = 1,
}

local products = {}
if ARGV[1] == 'each' then
  for i = 5, #KEYS do products[#products + 1] = redis.call('HGETALL', KEYS[i]) end
else
  -- Of `free` what can be bought: of a draft and of an archived product that is nothing (max 0).
  local sums = {on_sale = 0}
  for i = 5, #KEYS do
    local fields, free, max = redis.call('HGETALL', KEYS[i]), 0, '0'
    for at = 1, #fields, 2 do
      local name, value = fields[at], fields[at + 1]
      if not TERMS[name] then sums[name] = (sums[name] or 0) + (tonumber(value) or 0) end
      if name == 'free' then free = value elseif name == 'max' then max = value end
    end
    if max ~= '0' then sums.on_sale = sums.on_sale + free end
  end
  products[1] = {}
  for name, sum in pairs(sums) do
    table.insert(products[1], name)
    table.insert(products[1], sum)
  end
end
local head = redis.call('XRANGE', KEYS[2], '-', '+', 'COUNT', 1)[1]
return {
  redis.call('GET', KEYS[1]) or '',
  redis.call('GET', KEYS[3]) or '0',
  redis.call('XLEN', KEYS[2]),
  head and head[2][2] or '',
  redis.call('GET', KEYS[4]) or '',
  products,
}
