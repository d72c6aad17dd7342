-- The Redis half of the ledger, at one instant: counters, and what the outbox really holds.
--
-- KEYS  1 generation   2 movements   3 outbox   4 order ids   5.. product hashes; then, where there
--       are several shards, the hashes of what was lent of each product
-- ARGV  1 the last order id known to be stored (0 for none)   2 count the outbox if it holds no more
--       than so many orders   3 number of product ids, then these ids, in the order of their hashes;
--       then the ids of movements asked about
-- Returns {generation, order id counter, waiting orders, 1 when they were counted, movement ids
--          applied, {per product: 1 when on sale, free, moved, accepted, claimed, settled,
--          settled_units, persisted, stored but waiting: orders, units, waiting: orders, units,
--          received from other shards less what was sent to them}}.

local through, count = tonumber(ARGV[1]), tonumber(ARGV[3])
local sums, accounts = {}, {}
for i = 1, count do
  local fields = redis.call('HMGET', KEYS[4 + i],
    'free', 'moved', 'accepted', 'claimed', 'settled', 'settled_units', 'persisted')
  local account = { fields[1] and 1 or 0 }
  for j = 1, 7 do account[j + 1] = tonumber(fields[j] or 0) end
  for j = 9, 13 do account[j] = 0 end
  local lent = KEYS[4 + count + i] and redis.call('HGETALL', KEYS[4 + count + i]) or {}
  for j = 1, #lent, 2 do
    local way = string.match(lent[j], '^%a+')
    if way == 'recv' then account[13] = account[13] + lent[j + 1]
    elseif way == 'sent' then account[13] = account[13] - lent[j + 1] end
  end
  accounts[i], sums[ARGV[3 + i]] = account, account
end

local applied = {}
for i = 4 + count, #ARGV do
  if redis.call('GETBIT', KEYS[2], ARGV[i]) == 1 then applied[#applied + 1] = ARGV[i] end
end

local waiting = redis.call('XLEN', KEYS[3])
local counted = waiting <= tonumber(ARGV[2])
local entries = {}
if counted then entries = redis.call('XRANGE', KEYS[3], '-', '+')
elseif through > 0 then entries = redis.call('XRANGE', KEYS[3], '-', ARGV[1] .. '-0') end
for _, entry in ipairs(entries) do
  local product, units = string.match(string.gsub(entry[2][2], '^v2 ', ''), '^%S+ (%d+) (%d+) ')
  local account = product and sums[product]
  if account then
    if tonumber(string.match(entry[1], '^%d+')) <= through then
      account[9], account[10] = account[9] + 1, account[10] + units
    end
    account[11], account[12] = account[11] + 1, account[12] + units
  end
end
return {
  redis.call('GET', KEYS[1]) or '',
  redis.call('GET', KEYS[4]) or '0',
  waiting,
  counted and 1 or 0,
  applied,
  accounts,
}
