-- A few shoppers who don't let go: past their first attempts every answer is a 429.
--
--   wrk -t2 -c64 -d10s -s limited.lua http://127.0.0.1:3000/purchase -- <first> <users> <product> [count]

dofile(debug.getinfo(1, "S").source:match("^@(.*/)") .. "report.lua")

local requests, turn = {}, 0

function init(args)
  local first, users, product = tonumber(args[1]), tonumber(args[2]), tonumber(args[3])
  assert(first and users and product, "usage: wrk -s limited.lua URL -- <first> <users> <product> [count]")
  if args[4] == "count" then count_statuses() end

  wrk.method = "POST"
  wrk.headers["Content-Type"] = "application/json"
  for i = 1, users do
    local user = first + i - 1
    wrk.body = string.format('{"userId":%.0f,"productId":%.0f,"quantity":1}', user, product)
    requests[i] = wrk.format()
  end
end

function request()
  turn = turn % #requests + 1
  return requests[turn]
end
