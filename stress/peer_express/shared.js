// What server, worker and seed agree on: settings, connections and key names.

import { Queue } from "bullmq";
import { Redis } from "ioredis";
import pg from "pg";

const { REDIS_URL = "redis://127.0.0.1:6379", DATABASE_URL } = process.env;

export const QUEUE = "orders";
export const stockKey = (productId) => `stock:${productId}`;

// BullMQ's workers require maxRetriesPerRequest to be null.
export const connectRedis = () => new Redis(REDIS_URL, { maxRetriesPerRequest: null });

export const connectPostgres = () => new pg.Pool({ connectionString: DATABASE_URL, max: 5 });

export const openQueue = (connection) =>
  new Queue(QUEUE, {
    connection,
    defaultJobOptions: { removeOnComplete: true, attempts: 3 },
    streams: { events: { maxLen: 100 } }, // nobody listens to the events here
  });
