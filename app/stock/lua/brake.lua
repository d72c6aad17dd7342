#!lua flags=allow-oom
-- Set or release a brake, and note the act for the audit; also in a Redis that is past maxmemory.
--
-- KEYS  1 brakes   2 acts, for the audit   3 generation   4 products   5 the product, or 4 again
--       6 marks: of each brake its newest act   7 the answer to this Idempotency-Key (only with a key)
-- ARGV  1 1 to set, 0 to release   2 product id, '*' for the whole sale   3 the act, as JSON; '' where
--       it is brought from another shard, which has noted it   4 how long the key is kept, ms
--       5 when the act was, ms   6 its id
-- Returns {outcome, products that the brake is for, brakes}: done | repeated | mismatched | unknown;
-- outdated where a later act of this brake was here already, and nothing is changed.
--
-- The brakes are one text of words between blanks, ' * 3 7 ', so that a claim reads them in a command
-- that it sends anyway; most of the time there is no such key.

local on, word, at = ARGV[1] == '1', ' ' .. ARGV[2] .. ' ', tonumber(ARGV[5])
local brakes = redis.call('GET', KEYS[1]) or ' '
local request = ARGV[1] .. word
if KEYS[7] then
  local known = redis.call('GET', KEYS[7])
  if known then
    if string.sub(known, 1, #request) ~= request then return { 'mismatched', 0, brakes } end
    return { 'repeated', tonumber(string.sub(known, #request + 1)), brakes }
  end
end

local products = 1
if ARGV[2] == '*' then products = redis.call('SCARD', KEYS[4])
-- While a sale is being made anew nobody can tell which products there are.
elseif ARGV[3] ~= '' and redis.call('EXISTS', KEYS[5]) == 0 and redis.call('EXISTS', KEYS[3]) == 1 then
  return { 'unknown', 0, brakes }
end

local mark = redis.call('HGET', KEYS[6], ARGV[2])
if mark then
  local known_at, known_id = string.match(mark, '^(%d+) %d (.*)$')
  known_at = tonumber(known_at)
  if known_at > at or known_at == at and known_id >= ARGV[6] then
    return { 'outdated', products, brakes }
  end
end
redis.call('HSET', KEYS[6], ARGV[2], ARGV[5] .. ' ' .. ARGV[1] .. ' ' .. ARGV[6])

local first, last = string.find(brakes, word, 1, true)
if on ~= (first ~= nil) then
  brakes = on and brakes .. ARGV[2] .. ' '
    or string.sub(brakes, 1, first) .. string.sub(brakes, last + 1)
  if brakes == ' ' then redis.call('DEL', KEYS[1]) else redis.call('SET', KEYS[1], brakes) end
  if ARGV[3] ~= '' then
    local time = redis.call('TIME')
    local now = string.format('%d', time[1] * 1000 + math.floor(time[2] / 1000))
    redis.call('RPUSH', KEYS[2], now .. ' ' .. request .. ARGV[3])
  end
end
if KEYS[7] then redis.call('SET', KEYS[7], request .. products, 'PX', ARGV[4]) end
return { 'done', products, brakes }
