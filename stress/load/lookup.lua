-- The orders of random shoppers between two ids.
--
--   wrk -t2 -c64 -d10s -s lookup.lua http://127.0.0.1:3000 -- <first> <last> [count]

dofile(debug.getinfo(1, "S").source:match("^@(.*/)") .. "report.lua")

local first, last, before, after

function init(args)
  first, last = tonumber(args[1]), tonumber(args[2])
  assert(first and last, "usage: wrk -s lookup.lua URL -- <first> <last> [count]")
  if args[3] == "count" then count_statuses() end

  math.randomseed(thread_index + 1)
  before, after = wrk.format("GET", "/purchase/orders/0"):match("^(.*/purchase/orders/)0(.*)$")
end

function request()
  return before .. math.random(first, last) .. after
end
