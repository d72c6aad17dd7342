-- Forget entries that were given, once the replicas of the shard that got them have it.
--
-- KEYS  1 generation   2 sent
-- ARGV  1 the sale, as it is named here: a rebuild numbers entries anew   2.. numbers of entries
-- Returns how many there were.

if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
local ids = {}
for i = 2, #ARGV do ids[i - 1] = ARGV[i] .. '-0' end
return redis.call('XDEL', KEYS[2], unpack(ids))
