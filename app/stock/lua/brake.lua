#!lua flags=allow-oom
-- Set or release a brake, and note the act for the audit; also in a Redis that is past maxmemory.
--
-- KEYS  1 brakes   2 acts, for the audit   3 generation   4 products   5 the product, or 4 again
--       6 the answer to this Idempotency-Key (only with a key)
-- ARGV  1 1 to set, 0 to release   2 product id, '*' for the whole sale   3 the act, as JSON
--       4 how long the key is kept, ms
-- Returns {outcome, products that the brake is for, brakes}: done | repeated | mismatched | unknown.
--
-- The brakes are one text of words between blanks, ' * 3 7 ', so that a claim reads them in a command
-- that it sends anyway; most of the time there is no such key.

local on, word = ARGV[1] == '1', ' ' .. ARGV[2] .. ' '
local brakes = redis.call('GET', KEYS[1]) or ' '
local request = ARGV[1] .. word
if KEYS[6] then
  local known = redis.call('GET', KEYS[6])
  if known then
    if string.sub(known, 1, #request) ~= request then return { 'mismatched', 0, brakes } end
    return { 'repeated', tonumber(string.sub(known, #request + 1)), brakes }
  end
end

local products = 1
if ARGV[2] == '*' then products = redis.call('SCARD', KEYS[4])
-- While a sale is being made anew nobody can tell which products there are.
elseif redis.call('EXISTS', KEYS[5]) == 0 and redis.call('EXISTS', KEYS[3]) == 1 then
  return { 'unknown', 0, brakes }
end

local first, last = string.find(brakes, word, 1, true)
if on ~= (first ~= nil) then
  brakes = on and brakes .. ARGV[2] .. ' '
    or string.sub(brakes, 1, first) .. string.sub(brakes, last + 1)
  if brakes == ' ' then redis.call('DEL', KEYS[1]) else redis.call('SET', KEYS[1], brakes) end
  local time = redis.call('TIME')
  local now = string.format('%d', time[1] * 1000 + math.floor(time[2] / 1000))
  redis.call('RPUSH', KEYS[2], now .. ' ' .. request .. ARGV[3])
end
if KEYS[6] then redis.call('SET', KEYS[6], request .. products, 'PX', ARGV[4]) end
return { 'done', products, brakes }
