-- What the load scripts share: wrk's figures as one line of JSON, the last line wrk prints.
--
-- Without counting, wrk itself tells only 2xx/3xx from the rest ("refused"), at no cost. A
-- response() callback counts each status, but wrk then copies every header into Lua: see
-- `count_statuses`.
--
-- Percentiles are wrk's own, corrected for coordinated omission.

local threads = {}

function setup(thread)
  thread:set("thread_index", #threads)
  threads[#threads + 1] = thread
end

-- Call it from init() to count every status; wrk looks for response() after init.
function count_statuses()
  statuses = {}
  function response(status)
    statuses[status] = (statuses[status] or 0) + 1
  end
end

-- The total of each status over all threads, or nil when they weren't counted.
local function counted()
  local total
  for _, thread in ipairs(threads) do
    for status, count in pairs(thread:get("statuses") or {}) do
      total = total or {}
      total[status] = (total[status] or 0) + count
    end
  end
  return total
end

local function object(pairs_in_order)
  local fields = {}
  for i, pair in ipairs(pairs_in_order) do
    fields[i] = string.format('"%s":%s', pair[1], pair[2])
  end
  return "{" .. table.concat(fields, ",") .. "}"
end

local function statuses_object(total)
  local fields = {}
  for status, count in pairs(total) do
    fields[#fields + 1] = { status, string.format("%d", count) }
  end
  table.sort(fields, function(a, b) return a[1] < b[1] end)
  return object(fields)
end

function done(summary, latency)
  local errors = summary.errors
  local fields = {
    { "requests", string.format("%d", summary.requests) },
    { "duration_us", string.format("%d", summary.duration) },
    { "ok", string.format("%d", summary.requests - errors.status) },
    { "refused", string.format("%d", errors.status) },
  }
  for _, p in ipairs({ 50, 90, 99, 99.9 }) do
    fields[#fields + 1] = { "p" .. p .. "_us", string.format("%d", latency:percentile(p)) }
  end
  fields[#fields + 1] = { "max_us", string.format("%d", latency.max) }
  fields[#fields + 1] = {
    "socket_errors",
    string.format("%d", errors.connect + errors.read + errors.write + errors.timeout),
  }
  local total = counted()
  if total then fields[#fields + 1] = { "statuses", statuses_object(total) } end
  print(object(fields))
end
