-- Decide one purchase, all or nothing: replay? -> rate -> product, window, pause, brake -> caps -> stock.
--
-- KEYS  1 generation   2 brakes   3 and 4 attempts, by turns   5 product   6 bought (a bucket of users)
--       7 outbox       8 queued   9 order ids   10 refused   11 units by address (only where they
--       are limited)   then the idempotency key's (only with a key)
-- ARGV  1 user   2 product   3 quantity   4 field of the user in KEYS[6]   5 address   6 network ('' where
--       networks are not limited)   7 the idempotency key, or ''   8 score in the queued   9 expected price
--       in cents, or ''   10 reference, or ''
-- What is the same for every claim stands in a line that lines.py puts before this script:
--       USER_, EARLY_, ADDRESS_, NETWORK_: LIMIT (attempts, 0 for no limit) and WINDOW (ms),
--       ADDRESS_UNITS (0 for no limit), TURN (ms, see below), MOST_BYTES of attempts,
--       MOST_WAITING orders in the outbox, KEY_LIFE in ms
-- Returns {outcome, detail, attempts left, ms until one more is allowed, price}; attempts left is -1 where
-- the rate limit was not reached. detail: the order id, the units left, or the opening time in ms.
-- An error that begins with UNDONE: nothing was sold, and nothing is left of it.
--
-- A script that fails midway is not rolled back, so everything is checked first and written last.
--
-- Attempts and counts of refusals stay out of Redis's log and replicas, so that a refusal costs no
-- write to disk. What a crash forgets is a minute's window, and a second's counts: see keep.lua.
-- Attempts have no expiry either, since Redis logs the deletion of whatever expires. They stand in two
-- hashes by turns, each for TURN ms: what is older than one turn is out of every window, so the first
-- claim of a turn throws away what it finds in its hash.

redis.set_repl(redis.REPL_NONE)
local user, product_id, address, network = ARGV[1], ARGV[2], ARGV[5], ARGV[6]
local quantity = tonumber(ARGV[3])
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

local key = KEYS[ADDRESS_UNITS > 0 and 12 or 11]
local known = key and redis.call('MGET', KEYS[1], KEYS[2], key) or redis.call('MGET', KEYS[1], KEYS[2])

-- No generation: this Redis has lost the sale (or never had it). Selling from it would oversell.
if not known[1] then return { 'unprepared', 0, -1, 0, '' } end

local product = redis.call('HMGET', KEYS[5],
  'free', 'opens', 'closes', 'pause', 'cap', 'max', 'price', 'accepted', 'claimed')
local free = tonumber(product[1])
-- Counted by pcall: refusals are given, and replays answered, where Redis has no memory left.
local counters = free and KEYS[5] or KEYS[10]

local turn = math.floor(now / TURN)
local here, before = KEYS[3 + turn % 2], KEYS[4 - turn % 2]
local user_field, address_field, network_field = 'u' .. user, 'a' .. address, 'n' .. network
-- The field '' says which turn a hash is of, when its size was looked at last, and if it may grow.
local mine = redis.call('HMGET', here, '', user_field, address_field, network_field)
if mine[1] and struct.unpack('>d', mine[1]) ~= turn then
  redis.call('UNLINK', here)
  mine = {}
end
local earlier = mine
if not (mine[2] and mine[3]) then
  earlier = redis.call('HMGET', before, '', user_field, address_field, network_field)
end

-- A sliding counter: this window's attempts, and the last one's share that is still in sight. Returns
-- the record with one attempt more, or nothing and how long to wait for one.
local function slide(now, record, limit, window)
  local slot, this, last = math.floor(now / window), 0, 0
  if record then
    local s, t, l = struct.unpack('>ddd', record)
    if s == slot then this, last = t, l elseif s == slot - 1 then last = t end
  end
  local elapsed = now - slot * window
  if this + last * (1 - elapsed / window) + 1 <= limit then return struct.pack('>ddd', slot, this + 1, last) end
  local wait = window - elapsed
  if last > 0 and this + 1 <= limit then
    wait = math.ceil(window * (1 - (limit - this - 1) / last)) - elapsed
  end
  return nil, math.max(wait, 1)
end

local request, order_id, first_request = product_id .. ' ' .. ARGV[3], nil, nil
if ARGV[10] ~= '' then request = request .. ' ' .. ARGV[10] end
if known[3] then order_id, first_request = string.match(known[3], '^(%d+) (.+)$') end

-- The rate. A replay counts for its address alone.
local outcome, detail, left, reset, wait = nil, 0, -1, 0, nil
local user_record, address_record, network_record
if USER_LIMIT > 0 and not order_id then
  -- The user's attempts of the last window, oldest first, 8 bytes each: exact, at any moment.
  local attempts = mine[2] or earlier[2] or ''
  -- A stamp from the future means that the clock was set back: forget the attempts, don't lock out.
  if #attempts > 0 and struct.unpack('>d', attempts, #attempts - 7) > now then attempts = '' end
  local first = 1
  while first < #attempts and struct.unpack('>d', attempts, first) <= now - USER_WINDOW do first = first + 8 end
  if first > 1 then attempts = string.sub(attempts, first) end
  left = USER_LIMIT - #attempts / 8
  reset = #attempts > 0 and struct.unpack('>d', attempts) + USER_WINDOW - now or USER_WINDOW
  if left <= 0 then outcome, wait = 'limited', reset end
  user_record = attempts .. struct.pack('>d', now)
end
if ADDRESS_LIMIT > 0 and not outcome then
  address_record, wait = slide(now, mine[3] or earlier[3], ADDRESS_LIMIT, ADDRESS_WINDOW)
  if wait then outcome = 'limited_address' end
end
if NETWORK_LIMIT > 0 and not outcome then
  network_record, wait = slide(now, mine[4] or earlier[4], NETWORK_LIMIT, NETWORK_WINDOW)
  if wait then outcome = 'limited_network' end
end
if outcome then
  redis.pcall('HINCRBY', counters, outcome, 1)
  return { outcome, 0, 0, wait, '' }
end

if order_id then outcome = first_request == request and 'replayed' or 'mismatched'
elseif not free then outcome = 'unknown'
elseif quantity > tonumber(product[6]) then outcome, detail = 'too_many', tonumber(product[6])
else
  local opens, closes, cap = tonumber(product[2]), tonumber(product[3]), tonumber(product[5])
  if closes and closes <= now then outcome = 'ended'
  elseif product[4] == '1' or known[2] and (string.find(known[2], ' * ', 1, true)
      or string.find(known[2], ' ' .. product_id .. ' ', 1, true)) then outcome = 'paused'
  elseif opens and opens > now then outcome, detail = 'not_open', opens
  elseif ARGV[9] ~= '' and ARGV[9] ~= string.match(product[7], '^%d+') then outcome = 'price_changed'
  elseif cap and (tonumber(redis.call('HGET', KEYS[6], ARGV[4])) or 0) + quantity > cap then outcome = 'capped'
  elseif ADDRESS_UNITS > 0
      and (tonumber(redis.call('HGET', KEYS[11], address)) or 0) + quantity > ADDRESS_UNITS then
    outcome = 'capped_address'
  elseif free <= 0 then outcome = 'sold_out'
  elseif free < quantity then outcome, detail = 'insufficient', free
  -- Back-pressure: better a clear refusal than a Redis out of memory. Costs the shopper no attempt.
  elseif redis.call('XLEN', KEYS[7]) >= MOST_WAITING then
    redis.pcall('HINCRBY', counters, 'overloaded', 1)
    return { 'overloaded', 0, -1, 0, '' }
  end
end

-- Who comes too early keeps the user's attempts for the opening, and has others for this.
if user_record and (outcome == 'paused' or outcome == 'not_open') then
  user_field = 'e' .. user
  mine[2] = mine[1] and redis.call('HGET', here, user_field)
  user_record, wait =
    slide(now, mine[2] or redis.call('HGET', before, user_field), EARLY_LIMIT, EARLY_WINDOW)
  if wait then
    redis.pcall('HINCRBY', counters, 'limited_early', 1)
    return { 'limited_early', 0, 0, wait, '' }
  end
elseif user_record then left = left - 1 end

-- Note the attempt. What refused shoppers cost is bounded: a hash that takes more memory than it
-- leaves free gets no new fields, and who is new is not limited.
local may_grow = true
if user_record and not mine[2] or address_record and not mine[3] or network_record and not mine[4] then
  local checked, growing = 0, 0
  if mine[1] then checked, growing = select(2, struct.unpack('>ddd', mine[1])) end
  if now < checked or now > checked + 50 then
    local info = redis.pcall('INFO', 'memory')
    local function figure(name)
      return type(info) == 'string' and tonumber(string.match(info, '\n' .. name .. ':(%d+)')) or 0
    end
    local most, used = figure('maxmemory'), figure('used_memory') - figure('mem_not_counted_for_evict')
    local own = (redis.call('MEMORY', 'USAGE', here) or 0) + (redis.call('MEMORY', 'USAGE', before) or 0)
    growing = own < MOST_BYTES and (most == 0 or own < most - used) and 1 or 0
    -- The long value makes it a hash in which Redis finds fields at once, however few there are.
    redis.pcall('HSET', here, '', struct.pack('>ddd', turn, now, growing), '-', string.rep('-', 128))
  end
  may_grow = growing == 1
end
if may_grow and user_record and address_record and not network_record then
  redis.pcall('HSET', here, user_field, user_record, address_field, address_record)
else
  if user_record and (may_grow or mine[2]) then redis.pcall('HSET', here, user_field, user_record) end
  if address_record and (may_grow or mine[3]) then redis.pcall('HSET', here, address_field, address_record) end
  if network_record and (may_grow or mine[4]) then redis.pcall('HSET', here, network_field, network_record) end
end

if order_id then
  redis.pcall('HINCRBY', counters, outcome, 1)
  return { outcome, outcome == 'replayed' and tonumber(order_id) or 0, -1, 0, '' }
end
if outcome then
  redis.pcall('HINCRBY', counters, outcome, 1)
  return { outcome, detail, left, reset, outcome == 'price_changed' and product[7] or '' }
end

redis.set_repl(redis.REPL_ALL)
-- Each step can fail (no memory left, a key of another type, an id that is not above the last, a
-- right that is lacking); then those before it are taken back.
local entry = table.concat({ user, product_id, ARGV[3], product[7], string.format('%d', now), ARGV[7] }, ' ')
if ARGV[10] ~= '' or not string.find(user, '^%d+$') or ARGV[8] ~= user then entry = 'v2 ' .. entry .. ' ' .. ARGV[10] .. ' ' end
local accepted, claimed = product[8] + 1, product[9] + quantity
order_id = redis.call('INCR', KEYS[9])
local step, done = 1, redis.pcall('ZADD', KEYS[8], ARGV[8], order_id)
if type(done) ~= 'table' then step, done = 2, redis.pcall('HINCRBY', KEYS[6], ARGV[4], quantity) end
if step == 2 and type(done) ~= 'table' then
  step = 3
  done = redis.pcall('HSET', KEYS[5], 'free', free - quantity, 'accepted', accepted, 'claimed', claimed)
end
if step == 3 and type(done) ~= 'table' then
  step = 4
  if ADDRESS_UNITS > 0 then done = redis.pcall('HINCRBY', KEYS[11], address, quantity) end
end
if step == 4 and type(done) ~= 'table' then
  step = 5
  if key then done = redis.pcall('SET', key, order_id .. ' ' .. request, 'PX', KEY_LIFE) end
end
if step == 5 and (type(done) ~= 'table' or done.ok) then
  -- The order's id is also its id in the outbox.
  step, done = 6, redis.pcall('XADD', KEYS[7], order_id .. '-0', 'order', entry)
end
if step == 6 and type(done) ~= 'table' then return { 'accepted', order_id, left, reset, product[7] } end

if step > 5 and key then redis.call('DEL', key) end
if step > 4 and ADDRESS_UNITS > 0 then redis.call('HINCRBY', KEYS[11], address, -quantity) end
if step > 3 then redis.call('HSET', KEYS[5], 'free', free, 'accepted', product[8], 'claimed', product[9]) end
if step > 2 then redis.call('HINCRBY', KEYS[6], ARGV[4], -quantity) end
if step > 1 then redis.call('ZREM', KEYS[8], order_id) end
redis.call('DECR', KEYS[9])
return redis.error_reply('UNDONE ' .. done.err)
