-- Keep this second's figures, once, by the clock of Redis.
--
-- KEYS  1 history (a stream; the id's first half is the second)
-- ARGV  1 the figures   2 how many samples are kept
-- Returns 1, or 0 when this second is taken. Samples from the future are dropped (a worker with a
-- wrong clock left them, or this clock was set back): they would refuse every later one.

local AHEAD = 5
local second = tonumber(redis.call('TIME')[1])
local newest = redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)[1]
local last = newest and tonumber(string.match(newest[1], '^%d+')) or 0
if last >= second and last <= second + AHEAD then return 0 end

local function add()
  return redis.pcall('XADD', KEYS[1], 'MAXLEN', ARGV[2], second .. '-1', 'sample', ARGV[1])
end

-- A stream also remembers the highest id that it ever had, so it is made anew.
if last > second or type(add()) == 'table' then
  local kept = redis.call('XRANGE', KEYS[1], '-', (second - 1) .. '-9')
  redis.call('DEL', KEYS[1])
  for _, entry in ipairs(kept) do redis.call('XADD', KEYS[1], entry[1], unpack(entry[2])) end
  add()
end
return 1
