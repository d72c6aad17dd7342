-- Decide the purchases of one moment, in their order, each as if it had come alone, all or nothing:
-- replay? -> rate -> product, window, pause, brake -> price -> caps -> stock.
--
-- KEYS  1 generation   2 brakes   3 and 4 attempts, by turns   5 outbox   6 queued   7 order ids
--       8 refused   then the products; then, only where units by address are limited, each product's
--       units by address; then for each claim: bought (a bucket of users), and only with a key: the
--       keys of the bucket; then, only where replicas are asked for, the fence; last, for each claim
--       with a key the name under which 0.1.0 kept it
-- ARGV  1 how many products   2 how many claims   3 how many have a key   4 which shard of how many this
--       is, as the generation says it: '/6/2'; '' for the only one   then the products' ids; then for
--       each claim: user, field of the user in its buckets, number of its product (from 1), quantity,
--       address, and letters that say what follows: e expected price in cents, f what all
--       shards were found to have, k key, n network, r reference, s score in the queued, where that is
--       not the user
-- What is the same for every claim claims.py writes into this script in place of these words:
--       USER_, EARLY_, ADDRESS_, NETWORK_: LIMIT (attempts, 0 for no limit) and WINDOW (ms),
--       ADDRESS_UNITS (0 for no limit), TURN (ms, see below), MOST_BYTES of attempts,
--       MOST_WAITING orders in the outbox, REPLICAS that must have an order, SHARDS of the sale
-- Returns for each claim {outcome, detail, attempts left, ms until one more is allowed, text};
--       attempts left is -1 where the rate limit was not reached. detail: the order id, the units
--       left, or the opening time in ms. text: the price (and of an order that is held, until when, in
--       ms), or an ended order's status. Of not_open: in how many ms it opens.
--       Of sold_out and insufficient: held, where units may return.
--       away, where a shard that can't be reached may have some.
--       dry: others may have what this shard lacks, the text says of which sale; nothing is counted.
--       undone: this claim met what can't be, the text says what; nothing is left of it.
--
-- Redis runs all of this for each batch, of one claim too, and what Lua does then costs as much as the
-- commands: a table is made with all of its fields at once (a later one makes it grow), a function
-- that is made uses few variables of others, and globals are looked up once.
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
local call, try, KEYS, ARGV = redis.call, redis.pcall, KEYS, ARGV
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

local function failed(reply) return type(reply) == 'table' and reply.err end

local function read(...)
  local reply = redis.pcall(...)
  if failed(reply) then error(reply.err, 0) end
  return reply
end

local function undo(answer, why)
  answer[1], answer[2], answer[3], answer[4], answer[5] = 'undone', 0, -1, 0, why
end

-- 1. Read what the claims are, and what they need.

local product_count, claim_count, keyed = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local first_former = #KEYS - keyed + 1
local known = call('MGET', KEYS[1], KEYS[2], unpack(KEYS, first_former))
local claims, answers = {}, {}
-- No generation: this Redis has lost the sale (or never had it). Selling from it would oversell. So
-- would whoever deals shoppers to another number of shards.
if not known[1] or (string.match(known[1], '/.*') or '') ~= ARGV[4] then
  for i = 1, claim_count do answers[i] = { 'unprepared', 0, -1, 0, '' } end
  return answers
end

local products = {}
for i = 1, product_count do
  local id, hash = ARGV[4 + i], KEYS[8 + i]
  local figures = try('HMGET', hash, 'free', 'opens', 'closes', 'pause', 'cap', 'max', 'price',
    'accepted', 'claimed', 'hold', 'held', SHARDS > 1 and 'sealed' or 'max')
  local wrong = figures.err
  -- A product that can't be sold at all, a draft or an archived one, is published with a maximum of
  -- none: to shoppers it is not there.
  if wrong or not figures[1] or figures[6] == '0' then
    products[i] = { id = id, wrong = wrong, counts = KEYS[8], outcomes = false }
  else
    local opens, price, brakes = tonumber(figures[2]), figures[7], known[2]
    local paused = figures[4] == '1' or brakes and (string.find(brakes, ' * ', 1, true)
      or string.find(brakes, ' ' .. id .. ' ', 1, true))
    local product = {
      id = id, hash = hash, counts = hash, outcomes = false, price = price, paused = paused,
      free = tonumber(figures[1]), max = tonumber(figures[6]), cap = tonumber(figures[5]),
      accepted = tonumber(figures[8]), claimed = tonumber(figures[9]), changed = false,
      opens = opens, closes = tonumber(figures[3]), early = paused or opens and opens > now,
      hold = tonumber(figures[10]), held = tonumber(figures[11]) or 0, sealed = SHARDS > 1 and figures[12],
      cents = price and string.match(price, '^(%d+) %u+$'),
      -- Units that were counted of users and of addresses, with what claims of this batch add.
      bought = {}, by_address = ADDRESS_UNITS > 0 and {}, address_units = KEYS[8 + product_count + i],
    }
    if not (product.free and product.max and product.accepted and product.claimed and product.cents) then
      product.wrong = 'malformed product'
    end
    products[i] = product
  end
end

-- The attempts: the fields that are asked for, each once, their positions, and their newest records.
-- The field '' says which turn a hash is of, when its size was looked at last, and if it may grow.
local fields, positions, attempts, added, noted = { '' }, {}, nil, {}, {}
local function ask(field)
  local position = positions[field]
  if not position then
    position = #fields + 1
    fields[position], positions[field] = field, position
  end
  return position
end

local arg, key, former = 4 + product_count, 8 + (ADDRESS_UNITS > 0 and 2 or 1) * product_count, 2
for i = 1, claim_count do
  local user, address, product = ARGV[arg + 1], ARGV[arg + 5], products[tonumber(ARGV[arg + 3])]
  local units, letters = ARGV[arg + 4], ARGV[arg + 6]
  local claim = {
    user = user, field = ARGV[arg + 2], product = product, bucket = KEYS[key + 1], address = address,
    units = units, quantity = tonumber(units), request = product.id .. ' ' .. units, answer = false,
    id = false, by_user = USER_LIMIT > 0 and ask('u' .. user),
    by_early = USER_LIMIT > 0 and product.early and ask('e' .. user),
    by_address = ADDRESS_LIMIT > 0 and ask('a' .. address),
  }
  arg, key = arg + 6, key + 1
  for j = 1, #letters do
    arg = arg + 1
    claim[string.sub(letters, j, j)] = ARGV[arg]
  end
  if claim.r then claim.request = claim.request .. ' ' .. claim.r end
  if NETWORK_LIMIT > 0 then claim.by_network = ask('n' .. (claim.n or '')) end
  if claim.k then
    key, former = key + 1, former + 1
    claim.keys, claim.key_field, claim.former = KEYS[key], claim.field .. ' ' .. claim.k, known[former]
  end
  claims[i] = claim
end

local turn = math.floor(now / TURN)
local here, before = KEYS[3 + turn % 2], KEYS[4 - turn % 2]
local stale, checked, growing = false, 0, 0
if #fields > 1 then
  attempts = call('HMGET', here, unpack(fields))
  if attempts[1] then
    local of, when, may = struct.unpack('>ddd', attempts[1])
    if of == turn then checked, growing = when, may else stale, attempts = true, {} end
  end
  local missing, at = {}, {}
  for i = 2, #fields do
    if not attempts[i] then
      missing[#missing + 1], at[#missing + 1], added[i] = fields[i], i, true
    end
  end
  if #missing > 0 then
    local earlier = call('HMGET', before, unpack(missing))
    for i = 1, #missing do attempts[at[i]] = earlier[i] end
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

local function count(product, outcome)
  local outcomes = product.outcomes
  if outcomes then outcomes[outcome] = (outcomes[outcome] or 0) + 1
  else product.outcomes = { [outcome] = 1 } end
end

-- What was said under a key: {order id or the claim that gets one, request, price, status}, or false.
local function recorded(claim)
  local text, id, price, status, request = read('HGET', claim.keys, claim.key_field), nil, '', '+', nil
  if text then
    id, price, status, request = string.match(text, '^(%d+) (%S+ %S+) (%S+) (.+)$')
    if not id then error('malformed key', 0) end
    if price == '- -' then price = '' end
    if #status > 1 and string.sub(status, 1, 1) == '+' then
      price, status = price .. ' ' .. string.sub(status, 2), '+'
    end
  elseif claim.former then
    id, request = string.match(claim.former, '^(%d+) (.+)$')
    if not id then error('malformed key', 0) end
  end
  return id and { id = tonumber(id), request = request, price = price, status = status } or false
end

local function counted(hash, field)
  return tonumber(read('HGET', hash, field) or 0) or error('malformed units', 0)
end

local records, accepted, waiting, replayed = {}, {}, nil, false

local function decide(claim)
  local product, quantity, record, record_name = claim.product, claim.quantity, nil, nil
  if product.wrong then error(product.wrong, 0) end
  if claim.k then
    record_name = claim.user .. ' ' .. claim.k
    record = records[record_name]
    if record == nil then
      record = recorded(claim)
      records[record_name] = record
    end
  end

  -- The rate. A replay counts for its address alone.
  local left, reset, wait = -1, 0, nil
  local by_user, user_record, address_record, network_record = claim.by_user, nil, nil, nil
  if by_user and not record then
    -- The user's attempts of the last window, oldest first, 8 bytes each: exact, at any moment.
    local stamps = attempts[by_user] or ''
    left, reset = USER_LIMIT, USER_WINDOW
    -- A stamp from the future means that the clock was set back: forget the attempts, don't lock out.
    if #stamps > 0 and struct.unpack('>d', stamps, #stamps - 7) > now then stamps = '' end
    if #stamps > 0 then
      local first = 1
      while first < #stamps and struct.unpack('>d', stamps, first) <= now - USER_WINDOW do first = first + 8 end
      if first > 1 then stamps = string.sub(stamps, first) end
      left = USER_LIMIT - #stamps / 8
      if #stamps > 0 then reset = struct.unpack('>d', stamps) + USER_WINDOW - now end
    end
    if left <= 0 then
      count(product, 'limited')
      return { 'limited', 0, 0, reset, '' }
    end
    user_record = stamps .. struct.pack('>d', now)
  end
  if claim.by_address then
    address_record, wait = slide(attempts[claim.by_address], ADDRESS_LIMIT, ADDRESS_WINDOW)
    if wait then
      count(product, 'limited_address')
      return { 'limited_address', 0, 0, wait, '' }
    end
  end
  if claim.by_network then
    network_record, wait = slide(attempts[claim.by_network], NETWORK_LIMIT, NETWORK_WINDOW)
    if wait then
      count(product, 'limited_network')
      return { 'limited_network', 0, 0, wait, '' }
    end
  end

  local outcome, detail, text, bought, by_address = nil, 0, '', nil, nil
  if record then
    outcome = record.request ~= claim.request and 'mismatched' or record.status == '+' and 'replayed' or 'order_ended'
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
  elseif product.early then
    outcome, detail, text = 'not_open', product.opens, string.format('%d', product.opens - now)
  elseif claim.e and claim.e ~= product.cents then outcome, text = 'price_changed', product.price
  else
    if product.cap then
      bought = product.bought[claim.user]
      if not bought then
        bought = counted(claim.bucket, claim.field)
        product.bought[claim.user] = bought
      end
    end
    if ADDRESS_UNITS > 0 and not (bought and bought + quantity > product.cap) then
      by_address = product.by_address[claim.address]
      if not by_address then
        by_address = counted(product.address_units, claim.address)
        product.by_address[claim.address] = by_address
      end
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
        count(product, 'overloaded')
        return { 'overloaded', 0, -1, 0, '' }
      end
    end
  end

  -- Who comes too early keeps the user's attempts for the opening, and has others for this.
  if user_record and (outcome == 'paused' or outcome == 'not_open') then
    by_user = claim.by_early
    user_record, wait = slide(attempts[by_user], EARLY_LIMIT, EARLY_WINDOW)
    if wait then
      count(product, 'limited_early')
      return { 'limited_early', 0, 0, wait, '' }
    end
  elseif user_record then left = left - 1 end

  -- Nothing below can fail.
  if user_record then attempts[by_user], noted[by_user] = user_record, true end
  if address_record then attempts[claim.by_address], noted[claim.by_address] = address_record, true end
  if network_record then attempts[claim.by_network], noted[claim.by_network] = network_record, true end
  if outcome then
    count(product, outcome)
    return { outcome, detail, left, reset, text }
  end
  product.free, product.accepted = product.free - quantity, product.accepted + 1
  product.claimed, product.changed = product.claimed + quantity, true
  local price = product.price
  if product.hold then
    product.held, claim.held = product.held + quantity, string.format('%d', now + product.hold * 1000)
    price = price .. ' ' .. claim.held
  end
  if bought then product.bought[claim.user] = bought + quantity end
  if by_address then product.by_address[claim.address] = by_address + quantity end
  if record_name then
    records[record_name] = { claim = claim, request = claim.request, price = price, status = '+' }
  end
  waiting = waiting + 1
  accepted[#accepted + 1] = claim
  return { 'accepted', 0, left, reset, price }
end

for i = 1, claim_count do
  local claim = claims[i]
  local decided, answer = pcall(decide, claim)
  if not decided then answer = { 'undone', 0, -1, 0, tostring(answer) } end
  claim.answer, answers[i] = answer, answer
end

-- 3. Note attempts and refusals. What refused shoppers cost is bounded: a hash that takes more memory
-- than it leaves free gets no new fields, and who is new is not limited. By pcall: refusals are given,
-- and replays answered, where Redis has no memory left.

if stale then call('UNLINK', here) end
local pairs_noted = {}
for i = 2, #fields do
  if noted[i] then
    if added[i] and (now < checked or now > checked + 50) then
      local info = try('INFO', 'memory')
      local function figure(name)
        return type(info) == 'string' and tonumber(string.match(info, '\n' .. name .. ':(%d+)')) or 0
      end
      local most, used = figure('maxmemory'), figure('used_memory') - figure('mem_not_counted_for_evict')
      local own = (call('MEMORY', 'USAGE', here) or 0) + (call('MEMORY', 'USAGE', before) or 0)
      checked, growing = now, own < MOST_BYTES and (most == 0 or own < most - used) and 1 or 0
      -- The long value makes it a hash in which Redis finds fields at once, however few there are.
      try('HSET', here, '', struct.pack('>ddd', turn, now, growing), '-', string.rep('-', 128))
    end
    if not added[i] or growing == 1 then
      local at = #pairs_noted
      pairs_noted[at + 1], pairs_noted[at + 2] = fields[i], attempts[i]
    end
  end
end
if #pairs_noted > 0 then try('HSET', here, unpack(pairs_noted)) end
for i = 1, product_count do
  local product = products[i]
  if product.outcomes then
    for outcome, times in pairs(product.outcomes) do try('HINCRBY', product.counts, outcome, times) end
  end
end

-- An order that is told once more may be on no replica yet, and WAIT waits for this connection's
-- writes alone: see replicas.py. PEXPIRE is allowed where memory is short.
if REPLICAS > 0 and replayed then
  local fence = KEYS[first_former - 1]
  redis.set_repl(redis.REPL_ALL)
  local done = try('PEXPIRE', fence, '1000000000000')
  if done == 0 then done = try('SET', fence, '1') end
  if failed(done) then
    for _, answer in ipairs(answers) do
      if answer[1] == 'replayed' then undo(answer, done.err) end
    end
  end
end
if #accepted == 0 then return answers end

-- 4. Sell. Each step can fail (no memory left, a key of another type, an id that is not above the
-- last, a right that is lacking); then what was done for the claim is taken back. The outbox comes
-- last: an entry taken back would leave its id behind as the stream's highest.

redis.set_repl(redis.REPL_ALL)

local function uncount(hash, field, units)
  if redis.call('HINCRBY', hash, field, -units) <= 0 then redis.call('HDEL', hash, field) end
end

local function give_up(claim, why, steps)
  local product = claim.product
  if steps > 2 and claim.k then redis.call('HDEL', claim.keys, claim.key_field) end
  if steps > 1 and ADDRESS_UNITS > 0 then uncount(product.address_units, claim.address, claim.units) end
  if steps > 0 then uncount(claim.bucket, claim.field, claim.units) end
  product.free, product.accepted = product.free + claim.units, product.accepted - 1
  product.claimed = product.claimed - claim.units
  if claim.held then product.held = product.held - claim.units end
  claim.id = false
  undo(claim.answer, why)
end

local function put_products()
  for i = 1, product_count do
    local product, done = products[i], nil
    if product.changed then
      if product.hold then
        done = redis.pcall('HSET', product.hash, 'free', product.free, 'accepted', product.accepted,
          'claimed', product.claimed, 'held', product.held)
      else
        done = redis.pcall('HSET', product.hash, 'free', product.free, 'accepted', product.accepted,
          'claimed', product.claimed)
      end
      if failed(done) then return done.err end
    end
  end
end

-- A shard's ids are those that leave its number when divided by how many there are.
local ids = try('INCRBY', KEYS[7], #accepted * SHARDS)
if failed(ids) then
  for _, claim in ipairs(accepted) do give_up(claim, ids.err, 0) end
else
  local kept, scores, id = {}, {}, ids - (#accepted - 1) * SHARDS
  for i = 1, #accepted do
    local claim = accepted[i]
    claim.id = id
    local steps, done = 0, try('HINCRBY', claim.bucket, claim.field, claim.units)
    if ADDRESS_UNITS > 0 and not failed(done) then
      steps, done = 1, try('HINCRBY', claim.product.address_units, claim.address, claim.units)
    end
    if claim.k and not failed(done) then
      steps, done = 2, try('HSET', claim.keys, claim.key_field, string.format(
        '%d %s +%s %s', id, claim.product.price, claim.held or '', claim.request))
    end
    if failed(done) then give_up(claim, done.err, steps)
    else
      local at = #kept
      kept[at + 1], scores[2 * at + 1], scores[2 * at + 2] = claim, claim.s or claim.user, id
      id = id + SHARDS
    end
  end
  local sold, why = 0, nil
  if #kept > 0 then
    local queued = try('ZADD', KEYS[6], unpack(scores))
    why = failed(queued) and queued.err or put_products()
    local stamp = string.format('%d', now)
    for i = 1, why and 0 or #kept do
      local claim = kept[i]
      local entry = claim.user .. ' ' .. claim.product.id .. ' ' .. claim.units .. ' ' .. claim.product.price
        .. ' ' .. stamp .. ' ' .. (claim.k or '')
      if claim.s or claim.r or claim.held then
        entry = 'v2 ' .. entry .. ' ' .. (claim.r or '') .. ' ' .. (claim.held or '')
      end
      -- The order's id is also its id in the outbox.
      local done = try('XADD', KEYS[5], string.format('%d-0', claim.id), 'order', entry)
      why = failed(done) and done.err
      if why then break end
      claim.answer[2], sold = claim.id, i
    end
    for i = sold + 1, #kept do
      local claim = kept[i]
      if not failed(queued) then call('ZREM', KEYS[6], claim.id) end
      give_up(claim, why, 3)
    end
    if sold < #kept then put_products() end
  end
  if sold < #accepted then call('DECRBY', KEYS[7], (#accepted - sold) * SHARDS) end
end

-- Who came again under a key of this very batch is told what became of the first.
for i = 1, keyed > 0 and claim_count or 0 do
  local again = claims[i].again
  if again then
    if again.id then answers[i][2] = again.id else undo(answers[i], again.answer[5]) end
  end
end
return answers
