// Resets to one product with STOCK units and no orders. Run it while server and worker are idle.

import { readFile } from "node:fs/promises";
import { connectPostgres, connectRedis, openQueue, stockKey } from "./shared.js";

const stock = Number(process.env.STOCK ?? 100);
const redis = connectRedis();
const db = connectPostgres();
const queue = openQueue(redis);

await db.query(await readFile(new URL("schema.sql", import.meta.url), "utf8"));
await db.query("TRUNCATE orders, products");
await db.query("INSERT INTO products (id, name, stock) VALUES (1, 'Console', $1)", [stock]);
await queue.obliterate({ force: true });
await redis.set(stockKey(1), stock);
console.log(`product 1 has ${stock} units`);

await queue.close();
await redis.quit();
await db.end();
