// The API: a cluster of PROCESSES, each an Express app with its own connections.

import cluster from "node:cluster";
import express from "express";
import { connectPostgres, connectRedis, openQueue, stockKey } from "./shared.js";

const { HOST = "127.0.0.1", PORT = "3000", PROCESSES = "2", RATE_LIMIT = "5" } = process.env;
const RATE_WINDOW_SECONDS = 60;
const IDEMPOTENCY_SECONDS = 24 * 60 * 60;
const rateLimit = RATE_LIMIT === "off" ? Infinity : Number.parseInt(RATE_LIMIT, 10);

// Takes the units only if all of them are there: the stock never goes below zero.
const CLAIM = `
  local stock = tonumber(redis.call('GET', KEYS[1]) or 0)
  local quantity = tonumber(ARGV[1])
  if stock < quantity then return 0 end
  redis.call('DECRBY', KEYS[1], quantity)
  return 1
`;

const isCount = (value) => Number.isSafeInteger(value) && value >= 1;

function createApp() {
  const redis = connectRedis();
  const db = connectPostgres();
  const queue = openQueue(redis);
  redis.defineCommand("claim", { numberOfKeys: 1, lua: CLAIM });

  async function isRateLimited(userId) {
    if (rateLimit === Infinity) return false;
    const key = `rate:${userId}`;
    const attempts = await redis.incr(key);
    if (attempts === 1) await redis.expire(key, RATE_WINDOW_SECONDS);
    return attempts > rateLimit;
  }

  const app = express();
  app.disable("x-powered-by");
  app.disable("etag");
  app.use(express.json({ limit: "16kb" }));

  app.post("/purchase", async (req, res) => {
    const { userId, productId, quantity = 1 } = req.body ?? {};
    if (![userId, productId, quantity].every(isCount)) {
      return res.status(400).json({ error: "Invalid request" });
    }
    if (await isRateLimited(userId)) {
      return res.status(429).json({ error: "Too many requests" });
    }

    const key = req.get("idempotency-key");
    const idempotencyKey = key && `idempotency:${userId}:${key}`;
    const earlier = idempotencyKey && (await redis.get(idempotencyKey));
    if (earlier) return res.json(JSON.parse(earlier));

    if (!(await redis.claim(stockKey(productId), quantity))) {
      return res.status(409).json({ error: "Stock problem" });
    }
    await queue.add("order", { userId, productId, quantity });

    const answer = { status: "queued" };
    if (idempotencyKey) {
      await redis.set(idempotencyKey, JSON.stringify(answer), "EX", IDEMPOTENCY_SECONDS);
    }
    res.json(answer);
  });

  app.get("/purchase/orders/:userId", async (req, res) => {
    const { rows } = await db.query({
      name: "orders-of-user",
      text: `SELECT id::int, status, quantity FROM orders
             WHERE user_id = $1 ORDER BY id DESC LIMIT 50`,
      values: [req.params.userId],
    });
    res.json(rows);
  });

  app.get("/purchase/metrics", async (req, res) => {
    const [stock, depth, orders] = await Promise.all([
      redis.get(stockKey(req.query.productId ?? 1)),
      queue.getJobCountByTypes("waiting", "active", "delayed"),
      db.query("SELECT count(*)::int AS total FROM orders"),
    ]);
    res.json({
      stock_remaining: Number(stock),
      queue_depth: depth,
      total_processed: orders.rows[0].total,
    });
  });

  app.post("/products/restock", async (req, res) => {
    const { productId, amount } = req.body ?? {};
    if (![productId, amount].every(isCount)) {
      return res.status(400).json({ error: "Invalid request" });
    }
    const { rowCount } = await db.query("UPDATE products SET stock = stock + $2 WHERE id = $1", [
      productId,
      amount,
    ]);
    if (!rowCount) return res.status(404).json({ error: "Unknown product" });
    const stock = await redis.incrby(stockKey(productId), amount);
    res.json({ productId, amount, stock_remaining: stock });
  });

  return app;
}

if (cluster.isPrimary) {
  for (let i = 0; i < Number(PROCESSES); i++) cluster.fork();
  cluster.on("exit", () => process.exit(1));
} else {
  createApp().listen(Number(PORT), HOST);
}
