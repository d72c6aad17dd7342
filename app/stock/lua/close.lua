-- Close a sale: no claim and no movement is decided until it is opened again.
--
-- KEYS  1 generation   2 order ids
-- ARGV  1 the sale to close   2 an order id it has issued for sure; 0 closes it in any case
-- Returns 1 when it was closed. An id counter below the one in ARGV says that this Redis has gone
-- back in time: it would issue ids twice and sell units that are sold.

if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
local issued = tonumber(ARGV[2])
if issued > 0 and tonumber(redis.call('GET', KEYS[2]) or 0) >= issued then return 0 end
return redis.call('DEL', KEYS[1])
