-- Every request is a purchase by a shopper never seen before.
--
--   wrk -t2 -c64 -d10s -s buy.lua http://127.0.0.1:3000/purchase -- <base> <product> [count]
--
-- <base>  ids start above it; runs whose bases lie 10^9 apart never share a shopper (a base from
--         10^9 to 8·10^13, 9 threads at most)
-- count   count each status (slower)

dofile(debug.getinfo(1, "S").source:match("^@(.*/)") .. "report.lua")

local IDS_PER_THREAD = 1e8

local next_id, before, after

function init(args)
  local base, product = tonumber(args[1]), tonumber(args[2])
  assert(base and product, "usage: wrk -s buy.lua URL -- <base> <product> [count]")
  if args[3] == "count" then count_statuses() end

  next_id = base + thread_index * IDS_PER_THREAD
  wrk.method = "POST"
  wrk.headers["Content-Type"] = "application/json"
  wrk.body = string.format('{"userId":%.0f,"productId":%.0f,"quantity":1}', next_id, product)
  -- Ids of one thread are equally long, so only the digits between these two halves change.
  before, after = wrk.format():match('^(.*"userId":)%d+(.*)$')
end

function request()
  next_id = next_id + 1
  return before .. next_id .. after
end
