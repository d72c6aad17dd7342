-- Open dashboards: each connection asks for what changes by the second, once a second.
--
--   wrk -t1 -c20 -d10s -s dashboards.lua http://127.0.0.1:3000/admin/live -- <cookie>

dofile(debug.getinfo(1, "S").source:match("^@(.*/)") .. "report.lua")

function init(args)
  assert(args[1], "usage: wrk -s dashboards.lua URL -- <cookie>")
  math.randomseed(os.time())
  wrk.headers["User-Agent"] = "dashboards.lua"
  wrk.headers["Cookie"] = args[1]
  wrk.headers["X-Poll"] = "1"
  wrk.headers["HX-Request"] = "true"
end

-- Nobody's clock ticks with another's.
function delay()
  return math.random(500, 1500)
end
