-- Decide one purchase, all or nothing: replay? -> rate -> product, window, pause -> cap -> stock.
--
-- KEYS  1 generation   2 the user's rate   3 the address's rate   4 product   5 bought (a bucket of users)
--       6 outbox       7 queued            8 order ids            9 refused
--       10 brakes      11 idempotency (only with a key)
-- ARGV  1 user         2 product           3 quantity             4 field of the user in KEYS[5]
--       5 the idempotency key (only with a key)
-- What is the same for every claim stands in a line that claims.py puts before this script:
--       USER_LIMIT, USER_WINDOW, ADDRESS_LIMIT, ADDRESS_WINDOW (attempts, 0 for no limit, and ms),
--       MOST_WAITING orders in the outbox, KEY_LIFE in ms
-- Returns {outcome, detail, attempts left, ms until one more is allowed}; attempts left is -1 where
-- the rate limit was not reached. detail: the order id, the units left, or the opening time in ms.
--
-- A script that fails midway is not rolled back, so everything is checked first and written last.
--
-- Attempts and counts of refusals stay out of Redis's log and replicas, so that a refusal costs no
-- write to disk. What a crash forgets is a minute's window, and a second's counts: see keep.lua.

redis.set_repl(redis.REPL_NONE)
local user, product_id = ARGV[1], ARGV[2]
local quantity = tonumber(ARGV[3])
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

local known = KEYS[11] and redis.call('MGET', KEYS[1], KEYS[2], KEYS[3], KEYS[10], KEYS[11])
  or redis.call('MGET', KEYS[1], KEYS[2], KEYS[3], KEYS[10])

-- No generation: this Redis has lost the sale (or never had it). Selling from it would oversell.
if not known[1] then return { 'unprepared', 0, -1, 0 } end

local product = redis.call('HMGET', KEYS[4],
  'free', 'opens', 'closes', 'pause', 'cap', 'max', 'price', 'accepted', 'claimed')
local free = tonumber(product[1])

local function count(outcome)
  if free then redis.call('HINCRBY', KEYS[4], outcome, 1)
  else redis.call('HINCRBY', KEYS[9], outcome, 1) end
end

local request = product_id .. ' ' .. ARGV[3]
if known[5] then
  local order_id, first_request = string.match(known[5], '^(%d+) (.+)$')
  if first_request ~= request then count('mismatched'); return { 'mismatched', 0, -1, 0 } end
  count('replayed')
  return { 'replayed', tonumber(order_id), -1, 0 }
end

-- The user's attempts of the last window, oldest first, 8 bytes each: exact, at any moment.
local attempts, left, reset = '', -1, 0
if USER_LIMIT > 0 then
  attempts = known[2] or ''
  -- A stamp from the future means that the clock was set back: forget the attempts, don't lock out.
  if #attempts > 0 and struct.unpack('>d', attempts, #attempts - 7) > now then attempts = '' end
  local first = 1
  while first < #attempts and struct.unpack('>d', attempts, first) <= now - USER_WINDOW do first = first + 8 end
  if first > 1 then attempts = string.sub(attempts, first) end
  left = USER_LIMIT - #attempts / 8
  reset = #attempts > 0 and struct.unpack('>d', attempts) + USER_WINDOW - now or USER_WINDOW
  if left <= 0 then count('limited'); return { 'limited', 0, 0, reset } end
  left = left - 1
end

-- The address's attempts, as a sliding counter: this window's, and the last one's share still in sight.
local slot, this, last = 0, 0, 0
if ADDRESS_LIMIT > 0 then
  slot = math.floor(now / ADDRESS_WINDOW)
  -- 24 bytes: what an earlier version wrote in another form is forgotten.
  if known[3] and #known[3] == 24 then
    local s, t, l = struct.unpack('>ddd', known[3])
    if s == slot then this, last = t, l elseif s == slot - 1 then last = t end
  end
  local elapsed = now - slot * ADDRESS_WINDOW
  if this + last * (1 - elapsed / ADDRESS_WINDOW) + 1 > ADDRESS_LIMIT then
    count('limited_address')
    -- Room for one more comes as the last window slides out of sight, or with the next one.
    local wait = ADDRESS_WINDOW - elapsed
    if last > 0 and this + 1 <= ADDRESS_LIMIT then
      wait = math.ceil(ADDRESS_WINDOW * (1 - (ADDRESS_LIMIT - this - 1) / last)) - elapsed
    end
    return { 'limited_address', 0, 0, math.max(wait, 1) }
  end
end

local function attempt()
  if USER_LIMIT > 0 then redis.call('SET', KEYS[2], attempts .. struct.pack('>d', now), 'PX', USER_WINDOW) end
  if ADDRESS_LIMIT > 0 then
    redis.call('SET', KEYS[3], struct.pack('>ddd', slot, this + 1, last), 'PX', 2 * ADDRESS_WINDOW)
  end
end

local function refuse(outcome, detail)
  attempt()
  count(outcome)
  return { outcome, detail or 0, left, reset }
end

if not free then return refuse('unknown') end
if quantity > tonumber(product[6]) then return refuse('too_many', tonumber(product[6])) end
local opens, closes, cap = tonumber(product[2]), tonumber(product[3]), tonumber(product[5])
if closes and closes <= now then return refuse('ended') end
if product[4] == '1' or known[4] and (string.find(known[4], ' * ', 1, true)
    or string.find(known[4], ' ' .. product_id .. ' ', 1, true)) then return refuse('paused') end
if opens and opens > now then return refuse('not_open', opens) end
if cap and (tonumber(redis.call('HGET', KEYS[5], ARGV[4])) or 0) + quantity > cap then return refuse('capped') end
if free <= 0 then return refuse('sold_out') end
if free < quantity then return refuse('insufficient', free) end
-- Back-pressure: better a clear refusal than a Redis out of memory. Costs the shopper no attempt.
if redis.call('XLEN', KEYS[6]) >= MOST_WAITING then count('overloaded'); return { 'overloaded', 0, -1, 0 } end

attempt()
redis.set_repl(redis.REPL_ALL)

-- The order's id is also its id in the outbox. XADD is the one write that can fail (an id that is not
-- above the last), so it comes before any unit moves.
local order_id = redis.call('INCR', KEYS[8])
local entry = table.concat({ user, product_id, ARGV[3], product[7], string.format('%d', now), ARGV[5] or '' }, ' ')
redis.call('XADD', KEYS[6], order_id .. '-0', 'order', entry)
redis.call('ZADD', KEYS[7], user, order_id)
redis.call('HSET', KEYS[4], 'free', free - quantity, 'accepted', product[8] + 1, 'claimed', product[9] + quantity)
redis.call('HINCRBY', KEYS[5], ARGV[4], quantity)
if KEYS[11] then redis.call('SET', KEYS[11], order_id .. ' ' .. request, 'PX', KEY_LIFE) end
return { 'accepted', order_id, left, reset }
