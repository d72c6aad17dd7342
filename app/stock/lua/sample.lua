-- Keep this second's figures, once, by the clock of Redis.
--
-- KEYS  1 history (a stream; the id's first half is the second)   2 the same, one of each minute
-- ARGV  1 the figures   2 how many samples are kept   3 and how many of minutes
-- Returns 1, or 0 when this second is taken. Samples from the future are dropped (a worker with a
-- wrong clock left them, or this clock was set back): they would refuse every later one.

local AHEAD = 5
local second = tonumber(redis.call('TIME')[1])

local function newest(key)
  local entry = redis.call('XREVRANGE', key, '+', '-', 'COUNT', 1)[1]
  return entry and tonumber(string.match(entry[1], '^%d+')) or 0
end

local function keep(key, most)
  local function add()
    return redis.pcall('XADD', key, 'MAXLEN', most, second .. '-1', 'sample', ARGV[1])
  end
  -- A stream also remembers the highest id that it ever had, so it is made anew.
  if newest(key) > second or type(add()) == 'table' then
    local kept = redis.call('XRANGE', key, '-', (second - 1) .. '-9')
    redis.call('DEL', key)
    for _, entry in ipairs(kept) do redis.call('XADD', key, entry[1], unpack(entry[2])) end
    add()
  end
end

local last = newest(KEYS[1])
if last >= second and last <= second + AHEAD then return 0 end
keep(KEYS[1], ARGV[2])
last = newest(KEYS[2])
if last > second or math.floor(last / 60) < math.floor(second / 60) then keep(KEYS[2], ARGV[3]) end
return 1
