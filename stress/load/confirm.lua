-- Every request confirms the next order, with a key and a payment of its own.
--
--   wrk -t2 -c64 -d10s -s confirm.lua http://127.0.0.1:3000 -- <first order> <orders> <token>
--
-- A thread takes every second order (of two threads); past the last one it begins again.

dofile(debug.getinfo(1, "S").source:match("^@(.*/)") .. "report.lua")

local STEP = 2
local first, orders, at

function init(args)
  first, orders = tonumber(args[1]), tonumber(args[2])
  assert(args[3], "usage: wrk -s confirm.lua URL -- <first order> <orders> <token>")
  at = thread_index
  wrk.method = "POST"
  wrk.headers["Content-Type"] = "application/json"
  wrk.headers["Authorization"] = "Bearer " .. args[3]
end

function request()
  local id = string.format("%.0f", first + at % orders)
  at = at + STEP
  wrk.headers["Idempotency-Key"] = "confirm-" .. id
  return wrk.format("POST", "/orders/" .. id .. "/confirm", nil, '{"payment":"pi_' .. id .. '"}')
end
