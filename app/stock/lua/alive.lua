-- Note that a worker is alive, by the clock of Redis, whatever the worker's own one says.
--
-- KEYS  1 workers (names by the second in which each was last seen)
-- ARGV  1 the worker's name   2 seconds after which one is forgotten
-- Stamps from the future are forgotten: a worker with a wrong clock left them, or this clock was
-- set back.

local time = redis.call('TIME')
local now = string.format('%d.%06d', time[1], time[2])
redis.call('ZADD', KEYS[1], now, ARGV[1])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', tonumber(time[1]) - ARGV[2])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '(' .. now, '+inf')
