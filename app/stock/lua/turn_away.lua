-- Count purchases that the web server refused by itself, since their users were over the limit.
--
-- KEYS  1 refused   2.. product hashes
-- ARGV  for each product hash: how many

for i = 2, #KEYS do
  local counts = redis.call('HEXISTS', KEYS[i], 'free') == 1 and KEYS[i] or KEYS[1]
  redis.call('HINCRBY', counts, 'limited', ARGV[i - 1])
end
