-- Decide the purchases of one moment, in their order, each as if it had come alone, all or nothing:
-- replay? -> rate -> product, window, pause, brake -> price -> caps -> stock.
--
-- KEYS  1 generation   2 brakes   3 and 4 attempts, by turns   5 outbox   6 queued   7 order ids
--       8 refused   then the products; then, only where units by address are limited, each product's
--       units by address; then for each claim: bought (a bucket of users), and only with a key: the
--       keys of the bucket, and the name under which 0.1.0 kept this key; last, only where replicas
--       are asked for, the fence
-- ARGV  1 how many products   2 how many claims   3 which shard of how many this is, as the generation
--       says it: '/6/2'; '' for the only one   then the products' ids; then for each claim: user,
--       field of the user in its buckets, number of its product (from 1), quantity, address, and
--       letters that say what follows: e expected price in cents, f what all shards were found to have,
--       k key, n network, r reference,
--       s score in the queued, where that is not the user
-- What is the same for every claim stands in a line that claims.py puts before this script:
--       USER_, EARLY_, ADDRESS_, NETWORK_: LIMIT (attempts, 0 for no limit) and WINDOW (ms),
--       ADDRESS_UNITS (0 for no limit), TURN (ms, see below), MOST_BYTES of attempts,
--       MOST_WAITING orders in the outbox, REPLICAS that must have an order, SHARDS of the sale
-- Returns for each claim {outcome, detail, attempts left, ms until one more is allowed, text};
--       attempts left is -1 where the rate limit was not reached. detail: the order id, the units
--       left, or the opening time in ms. text: the price (and of an order that is held, until when, in
--       ms), or an ended order's status. Of sold_out and insufficient: held, where units may return.
--       away, where a shard that can't be reached may have some.
--       dry: others may have what this shard lacks, the text says of which sale; nothing is counted.
--       undone: this claim met what can't be, the text says what; nothing is left of it.
--
-- A script that fails midway is not rolled back, so everything is decided first, in tables, and
-- written last. What is wrong in storage is an error inside decide(), which harms one claim alone.
--
-- Attempts and counts of refusals stay out of Redis's log and replicas, so that a refusal costs no
-- write to disk. What a crash forgets is a minute's window, and a second's counts: see keep.lua.
-- Attempts have no expiry either, since Redis logs the deletion of whatever expires. They stand in two
-- hashes by turns, each for TURN ms: what is older than one turn is out of every window, so the first
-- claim of a turn throws away what it finds in its hash.
--
-- The record of a key: <order id> <cents> <currency> <status> <product> <quantity>[ <reference>], the
-- status being + as long as the order stands, followed by the end of its hold in ms, as it was when it
-- was claimed. 0.1.0 wrote <order id> <product> <quantity>.

redis.set_repl(redis.REPL_NONE)
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local LIMITED = USER_LIMIT > 0 or ADDRESS_LIMIT > 0 or NETWORK_LIMIT > 0

local function failed(reply) return type(reply) == 'table' and reply.err end

local function read(...)
  local reply = redis.pcall(...)
  if failed(reply) then error(reply.err, 0) end
  return reply
end

-- 1. Read what the claims are, and what they need.

local product_count, claims, products = tonumber(ARGV[1]), {}, {}
for i = 1, product_count do
  products[i] = { id = ARGV[3 + i], hash = KEYS[8 + i], by_address = KEYS[8 + product_count + i] }
end
local known_keys = { KEYS[1], KEYS[2] }
local arg, key = 3 + product_count, 8 + (ADDRESS_UNITS > 0 and 2 or 1) * product_count
for i = 1, tonumber(ARGV[2]) do
  local claim = {
    user = ARGV[arg + 1], field = ARGV[arg + 2], product = products[tonumber(ARGV[arg + 3])],
    units = ARGV[arg + 4], address = ARGV[arg + 5], bucket = KEYS[key + 1],
  }
  local letters = ARGV[arg + 6]
  arg, key = arg + 6, key + 1
  for j = 1, #letters do
    arg = arg + 1
    claim[string.sub(letters, j, j)] = ARGV[arg]
  end
  if claim.k then
    claim.keys, claim.key_field = KEYS[key + 1], claim.field .. ' ' .. claim.k
    known_keys[#known_keys + 1] = KEYS[key + 2]
    claim.former, key = #known_keys, key + 2
  end
  claims[i] = claim
end

local known = redis.call('MGET', unpack(known_keys))
-- No generation: this Redis has lost the sale (or never had it). Selling from it would oversell. So
-- would whoever deals shoppers to another number of shards.
local dealt = known[1] and string.match(known[1], '/.*') or ''
if not known[1] or dealt ~= ARGV[3] then
  for i = 1, #claims do claims[i] = { 'unprepared', 0, -1, 0, '' } end
  return claims
end

local FIGURES = { 'free', 'opens', 'closes', 'pause', 'cap', 'max', 'price', 'accepted', 'claimed', 'hold', 'held' }
if SHARDS > 1 then FIGURES[12] = 'sealed' end
for _, product in ipairs(products) do
  local figures = redis.pcall('HMGET', product.hash, unpack(FIGURES))
  product.wrong, product.counts = failed(figures), KEYS[8]
  -- A product that can't be sold at all, a draft or an archived one, is published with a maximum of
  -- none: to shoppers it is not there.
  if not product.wrong and figures[1] and figures[6] ~= '0' then
    product.free, product.max = tonumber(figures[1]), tonumber(figures[6])
    product.opens, product.closes = tonumber(figures[2]), tonumber(figures[3])
    product.cap, product.price = tonumber(figures[5]), figures[7]
    product.accepted, product.claimed = tonumber(figures[8]), tonumber(figures[9])
    product.hold, product.held = tonumber(figures[10]), tonumber(figures[11]) or 0
    product.sealed = figures[12]
    product.cents = product.price and string.match(product.price, '^(%d+) %u+$')
    product.paused = figures[4] == '1' or known[2] and (string.find(known[2], ' * ', 1, true)
      or string.find(known[2], ' ' .. product.id .. ' ', 1, true))
    product.early = product.paused or product.opens and product.opens > now
    product.counts = product.hash
    if not (product.free and product.max and product.accepted and product.claimed and product.cents) then
      product.wrong = 'malformed product'
    end
  end
end

-- The attempts: by field, the newest record, and whether it stands in this turn's hash.
local turn = math.floor(now / TURN)
local here, before = KEYS[3 + turn % 2], KEYS[4 - turn % 2]
-- The field '' says which turn a hash is of, when its size was looked at last, and if it may grow.
local attempts, stored, noted, stale, checked, growing = {}, {}, {}, false, 0, 0
if LIMITED then
  local fields, asked = { '' }, {}
  local function ask(field)
    if not asked[field] then
      asked[field] = true
      fields[#fields + 1] = field
    end
  end
  for _, claim in ipairs(claims) do
    if USER_LIMIT > 0 then
      claim.user_field = 'u' .. claim.user
      ask(claim.user_field)
      if claim.product.early then
        claim.early_field = 'e' .. claim.user
        ask(claim.early_field)
      end
    end
    if ADDRESS_LIMIT > 0 then
      claim.address_field = 'a' .. claim.address
      ask(claim.address_field)
    end
    if NETWORK_LIMIT > 0 then
      claim.network_field = 'n' .. (claim.n or '')
      ask(claim.network_field)
    end
  end
  local mine = redis.call('HMGET', here, unpack(fields))
  if mine[1] and struct.unpack('>d', mine[1]) ~= turn then
    stale, mine = true, {}
  elseif mine[1] then
    checked, growing = select(2, struct.unpack('>ddd', mine[1]))
  end
  local missing = {}
  for i = 2, #fields do
    local field = fields[i]
    if mine[i] then
      attempts[field], stored[field] = mine[i], true
    else missing[#missing + 1] = field end
  end
  if #missing > 0 then
    local earlier = redis.call('HMGET', before, unpack(missing))
    for i = 1, #missing do attempts[missing[i]] = earlier[i] or nil end
  end
end

-- 2. Decide. Each claim sees in the tables what those before it have changed.

-- A sliding counter: this window's attempts, and the last one's share that is still in sight. Returns
-- the record with one attempt more, or nothing and how long to wait for one.
local function slide(record, limit, window)
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

local counts = {}
local function count(claim, outcome)
  local of = counts[claim.product.counts]
  if not of then
    of = {}
    counts[claim.product.counts] = of
  end
  of[outcome] = (of[outcome] or 0) + 1
end

-- What was said under a key: {order id or the claim that gets one, request, price, status}, or false.
local records = {}
local function record_of(claim)
  local name = claim.keys .. ' ' .. claim.key_field
  local record = records[name]
  if record ~= nil then return record, name end
  local text, id, price, status, request = read('HGET', claim.keys, claim.key_field), nil, '', '+', nil
  if text then
    id, price, status, request = string.match(text, '^(%d+) (%S+ %S+) (%S+) (.+)$')
    if not id then error('malformed key', 0) end
    if price == '- -' then price = '' end
    if #status > 1 and string.sub(status, 1, 1) == '+' then
      price, status = price .. ' ' .. string.sub(status, 2), '+'
    end
  elseif known[claim.former] then
    id, request = string.match(known[claim.former], '^(%d+) (.+)$')
    if not id then error('malformed key', 0) end
  end
  record = id and { id = tonumber(id), request = request, price = price, status = status } or false
  records[name] = record
  return record, name
end

-- Units that were counted under a field, together with what claims of this batch add.
local unit_counts = {}
local function units_of(hash, field)
  local name = hash .. ' ' .. field
  if not unit_counts[name] then
    unit_counts[name] = tonumber(read('HGET', hash, field) or 0) or error('malformed units', 0)
  end
  return unit_counts[name], name
end

local waiting
local accepted, replayed = {}, false

local function decide(claim)
  local product, quantity = claim.product, tonumber(claim.units)
  if product.wrong then error(product.wrong, 0) end
  local request = product.id .. ' ' .. claim.units
  if claim.r then request = request .. ' ' .. claim.r end
  local record, record_name
  if claim.k then record, record_name = record_of(claim) end

  -- The rate. A replay counts for its address alone.
  local left, reset, wait = -1, 0, nil
  local user_field, user_record, address_record, network_record = claim.user_field, nil, nil, nil
  if USER_LIMIT > 0 and not record then
    -- The user's attempts of the last window, oldest first, 8 bytes each: exact, at any moment.
    local stamps = attempts[user_field] or ''
    -- A stamp from the future means that the clock was set back: forget the attempts, don't lock out.
    if #stamps > 0 and struct.unpack('>d', stamps, #stamps - 7) > now then stamps = '' end
    local first = 1
    while first < #stamps and struct.unpack('>d', stamps, first) <= now - USER_WINDOW do first = first + 8 end
    if first > 1 then stamps = string.sub(stamps, first) end
    left = USER_LIMIT - #stamps / 8
    reset = #stamps > 0 and struct.unpack('>d', stamps) + USER_WINDOW - now or USER_WINDOW
    if left <= 0 then
      count(claim, 'limited')
      return { 'limited', 0, 0, reset, '' }
    end
    user_record = stamps .. struct.pack('>d', now)
  end
  if ADDRESS_LIMIT > 0 then
    address_record, wait = slide(attempts[claim.address_field], ADDRESS_LIMIT, ADDRESS_WINDOW)
    if wait then
      count(claim, 'limited_address')
      return { 'limited_address', 0, 0, wait, '' }
    end
  end
  if NETWORK_LIMIT > 0 then
    network_record, wait = slide(attempts[claim.network_field], NETWORK_LIMIT, NETWORK_WINDOW)
    if wait then
      count(claim, 'limited_network')
      return { 'limited_network', 0, 0, wait, '' }
    end
  end

  local outcome, detail, text, cap_name, address_name = nil, 0, '', nil, nil
  if record then
    outcome = record.request ~= request and 'mismatched' or record.status == '+' and 'replayed' or 'order_ended'
    if outcome ~= 'mismatched' then
      detail, text = record.id or 0, outcome == 'replayed' and record.price or record.status
      replayed = replayed or outcome == 'replayed'
      claim.again = record.claim
    end
    left, reset = -1, 0
  elseif not product.free then outcome = 'unknown'
  elseif quantity > product.max then outcome, detail = 'too_many', product.max
  elseif product.closes and product.closes <= now then outcome = 'ended'
  elseif product.paused then outcome = 'paused'
  elseif product.early then outcome, detail = 'not_open', product.opens
  elseif claim.e and claim.e ~= product.cents then outcome, text = 'price_changed', product.price
  else
    local bought, by_address
    if product.cap then bought, cap_name = units_of(claim.bucket, claim.field) end
    if ADDRESS_UNITS > 0 and not (bought and bought + quantity > product.cap) then
      by_address, address_name = units_of(product.by_address, claim.address)
    end
    if bought and bought + quantity > product.cap then outcome = 'capped'
    elseif by_address and by_address + quantity > ADDRESS_UNITS then outcome = 'capped_address'
    elseif product.free < quantity then
      local left, away = product.free, nil
      if SHARDS > 1 then
        -- What all were found to have: just now, for this claim, or a moment ago, and it was nothing.
        local found = claim.f
        if not found and product.sealed then
          local till, rest = string.match(product.sealed, '^(%d+)(.*)$')
          if tonumber(till) > now then found = '0' .. rest end
        end
        if not found then return { 'dry', 0, -1, 0, known[1] } end
        local others, out_of_reach = string.match(found, '^(%d+)(.*)$')
        left, away = math.max(left, tonumber(others)), out_of_reach ~= ''
      end
      outcome, detail = left <= 0 and 'sold_out' or 'insufficient', math.max(left, 0)
      if product.held > 0 then text = 'held' end
      if away then text = text == '' and 'away' or 'held away' end
    else
      waiting = waiting or read('XLEN', KEYS[5])
      -- Back-pressure: better a clear refusal than a Redis out of memory. Costs the shopper no attempt.
      if waiting >= MOST_WAITING then
        count(claim, 'overloaded')
        return { 'overloaded', 0, -1, 0, '' }
      end
    end
  end

  -- Who comes too early keeps the user's attempts for the opening, and has others for this.
  if user_record and (outcome == 'paused' or outcome == 'not_open') then
    user_field = claim.early_field
    user_record, wait = slide(attempts[user_field], EARLY_LIMIT, EARLY_WINDOW)
    if wait then
      count(claim, 'limited_early')
      return { 'limited_early', 0, 0, wait, '' }
    end
  elseif user_record then left = left - 1 end

  -- Nothing below can fail.
  if user_record then attempts[user_field], noted[user_field] = user_record, true end
  if address_record then
    attempts[claim.address_field], noted[claim.address_field] = address_record, true
  end
  if network_record then
    attempts[claim.network_field], noted[claim.network_field] = network_record, true
  end
  if outcome then
    count(claim, outcome)
    return { outcome, detail, left, reset, text }
  end
  product.free, product.accepted = product.free - quantity, product.accepted + 1
  product.claimed, product.changed = product.claimed + quantity, true
  local price = product.price
  if product.hold then
    product.held, claim.held = product.held + quantity, string.format('%d', now + product.hold * 1000)
    price = price .. ' ' .. claim.held
  end
  if cap_name then unit_counts[cap_name] = unit_counts[cap_name] + quantity end
  if address_name then unit_counts[address_name] = unit_counts[address_name] + quantity end
  if record_name then
    records[record_name] = { claim = claim, request = request, price = price, status = '+' }
  end
  waiting, claim.request = waiting + 1, request
  accepted[#accepted + 1] = claim
  return { 'accepted', 0, left, reset, price }
end

local answers = {}
for i, claim in ipairs(claims) do
  local decided, answer = pcall(decide, claim)
  claim.answer = decided and answer or { 'undone', 0, -1, 0, tostring(answer) }
  answers[i] = claim.answer
end

-- 3. Note attempts and refusals. What refused shoppers cost is bounded: a hash that takes more memory
-- than it leaves free gets no new fields, and who is new is not limited. By pcall: refusals are given,
-- and replays answered, where Redis has no memory left.

if stale then redis.call('UNLINK', here) end
if next(noted) then
  local pairs_known, pairs_new = {}, {}
  for field in pairs(noted) do
    local to = stored[field] and pairs_known or pairs_new
    to[#to + 1] = field
    to[#to + 1] = attempts[field]
  end
  if #pairs_new > 0 then
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
    if growing == 1 then
      for i = 1, #pairs_new do pairs_known[#pairs_known + 1] = pairs_new[i] end
    end
  end
  if #pairs_known > 0 then redis.pcall('HSET', here, unpack(pairs_known)) end
end
for hash, of in pairs(counts) do
  for outcome, times in pairs(of) do redis.pcall('HINCRBY', hash, outcome, times) end
end

-- An order that is told once more may be on no replica yet, and WAIT waits for this connection's
-- writes alone: see replicas.py. PEXPIRE is allowed where memory is short.
if REPLICAS > 0 and replayed then
  redis.set_repl(redis.REPL_ALL)
  local done = redis.pcall('PEXPIRE', KEYS[#KEYS], '1000000000000')
  if done == 0 then done = redis.pcall('SET', KEYS[#KEYS], '1') end
  if failed(done) then
    for _, answer in ipairs(answers) do
      if answer[1] == 'replayed' then
        for i, word in ipairs({ 'undone', 0, -1, 0, done.err }) do answer[i] = word end
      end
    end
  end
end
if #accepted == 0 then return answers end

-- 4. Sell. Each step can fail (no memory left, a key of another type, an id that is not above the
-- last, a right that is lacking); then what was done for the claim is taken back. The outbox comes
-- last: an entry taken back would leave its id behind as the stream's highest.

redis.set_repl(redis.REPL_ALL)

local function give_up(claim, why)
  local product = claim.product
  product.free, product.accepted = product.free + claim.units, product.accepted - 1
  product.claimed = product.claimed - claim.units
  if claim.held then product.held = product.held - claim.units end
  claim.id = nil
  for i, word in ipairs({ 'undone', 0, -1, 0, why }) do claim.answer[i] = word end
end

local function uncount(hash, field, units)
  if redis.call('HINCRBY', hash, field, -units) <= 0 then redis.call('HDEL', hash, field) end
end

local function take_back(claim, steps)
  if steps > 2 and claim.k then redis.call('HDEL', claim.keys, claim.key_field) end
  if steps > 1 and ADDRESS_UNITS > 0 then uncount(claim.product.by_address, claim.address, claim.units) end
  if steps > 0 then uncount(claim.bucket, claim.field, claim.units) end
end

local function keep(claim)
  local done = redis.pcall('HINCRBY', claim.bucket, claim.field, claim.units)
  if failed(done) then return done.err end
  if ADDRESS_UNITS > 0 then
    done = redis.pcall('HINCRBY', claim.product.by_address, claim.address, claim.units)
    if failed(done) then
      take_back(claim, 1)
      return done.err
    end
  end
  if claim.k then
    local record = string.format(
      '%d %s +%s %s', claim.id, claim.product.price, claim.held or '', claim.request)
    done = redis.pcall('HSET', claim.keys, claim.key_field, record)
    if failed(done) then
      take_back(claim, 2)
      return done.err
    end
  end
end

local function put_products()
  for _, product in ipairs(products) do
    if product.changed then
      local held = product.hold and { 'held', product.held } or {}
      local done = redis.pcall('HSET', product.hash,
        'free', product.free, 'accepted', product.accepted, 'claimed', product.claimed, unpack(held))
      if failed(done) then return done.err end
    end
  end
end

-- A shard's ids are those that leave its number when divided by how many there are.
local stride = tonumber(string.match(dealt, '%d+') or 1)
local ids = redis.pcall('INCRBY', KEYS[7], #accepted * stride)
if failed(ids) then
  for _, claim in ipairs(accepted) do give_up(claim, ids.err) end
else
  local kept, scores, id = {}, {}, ids - #accepted * stride
  for _, claim in ipairs(accepted) do
    claim.id = id + stride
    local why = keep(claim)
    if why then give_up(claim, why)
    else
      id = id + stride
      kept[#kept + 1] = claim
      scores[#scores + 1] = claim.s or claim.user
      scores[#scores + 1] = claim.id
    end
  end
  local sold, why = 0, nil
  if #kept > 0 then
    local queued = redis.pcall('ZADD', KEYS[6], unpack(scores))
    why = failed(queued) and queued.err or put_products()
    local stamp = string.format('%d', now)
    for i = 1, why and 0 or #kept do
      local claim = kept[i]
      local entry = table.concat(
        { claim.user, claim.product.id, claim.units, claim.product.price, stamp, claim.k or '' }, ' ')
      if claim.s or claim.r or claim.held then
        entry = 'v2 ' .. entry .. ' ' .. (claim.r or '') .. ' ' .. (claim.held or '')
      end
      -- The order's id is also its id in the outbox.
      local added = redis.pcall('XADD', KEYS[5], string.format('%d-0', claim.id), 'order', entry)
      why = failed(added) and added.err
      if why then break end
      claim.answer[2], sold = claim.id, i
    end
    for i = sold + 1, #kept do
      local claim = kept[i]
      if not failed(queued) then redis.call('ZREM', KEYS[6], claim.id) end
      take_back(claim, 3)
      give_up(claim, why)
    end
    if sold < #kept then put_products() end
  end
  if sold < #accepted then redis.call('DECRBY', KEYS[7], (#accepted - sold) * stride) end
end

-- Who came again under a key of this very batch is told what became of the first.
for _, claim in ipairs(claims) do
  if claim.again then
    if claim.again.id then claim.answer[2] = claim.again.id
    else
      for i, word in ipairs({ 'undone', 0, -1, 0, claim.again.answer[5] }) do claim.answer[i] = word end
    end
  end
end
return answers
