-- Let counts of refusals reach Redis's log and replicas: claims don't write them there themselves.
--
-- KEYS  hashes with such counts
-- ARGV  the names of the counts
-- Returns nothing.

for _, key in ipairs(KEYS) do
  local pairs = {}
  for field, count in ipairs(redis.call('HMGET', key, unpack(ARGV))) do
    if count then
      pairs[#pairs + 1] = ARGV[field]
      pairs[#pairs + 1] = count
    end
  end
  if #pairs > 0 then redis.call('HSET', key, unpack(pairs)) end
end
