// Persists the queued orders, one job per order.

import { Worker } from "bullmq";
import { connectPostgres, connectRedis, QUEUE } from "./shared.js";

const concurrency = Number(process.env.CONCURRENCY ?? 20);
const db = connectPostgres();

// Named, so that PostgreSQL parses it once per connection.
const insertOrder = {
  name: "insert-order",
  text: `INSERT INTO orders (id, user_id, product_id, quantity)
         VALUES ($1, $2, $3, $4) ON CONFLICT (id) DO NOTHING`,
};

async function persist({ id, data }) {
  await db.query({ ...insertOrder, values: [id, data.userId, data.productId, data.quantity] });
}

const worker = new Worker(QUEUE, persist, { connection: connectRedis(), concurrency });
worker.on("failed", (job, error) => console.error(`order ${job?.id}: ${error.message}`));
worker.on("error", (error) => console.error(error.message));

for (const signal of ["SIGINT", "SIGTERM"]) {
  process.once(signal, async () => {
    await worker.close();
    await db.end();
    process.exit(0);
  });
}
