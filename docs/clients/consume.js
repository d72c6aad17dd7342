// Take webhooks: node consume.js PORT INBOX
//
// Verifies each delivery, writes its events to the file INBOX once each, and answers 204. What is to
// be done with them is done afterwards, here by printing a line for each.
// Environment: WEBHOOK_SECRET, the endpoint's secret; after a rotation both, with a blank between.

'use strict';
const crypto = require('crypto');
const fs = require('fs');
const http = require('http');

const MOST_BYTES = 1024 * 1024;
const TOLERANCE_SECONDS = 300; // an older timestamp may be somebody's copy of a delivery

/** Tell whether a delivery was signed with one of the secrets, a moment ago. */
function isGenuine(headers, body, secrets, now) {
  const id = headers['webhook-id'] || '';
  const timestamp = headers['webhook-timestamp'] || '';
  if (!/^[0-9]{1,15}$/.test(timestamp) || Math.abs(now - Number(timestamp)) > TOLERANCE_SECONDS) return false;
  const given = (headers['webhook-signature'] || '').split(' ').map((text) => Buffer.from(text));
  return secrets.some((secret) => {
    const key = Buffer.from(secret.replace(/^whsec_/, ''), 'base64');
    const signature = crypto.createHmac('sha256', key).update(`${id}.${timestamp}.`).update(body).digest('base64');
    const wanted = Buffer.from(`v1,${signature}`);
    return given.some((one) => one.length === wanted.length && crypto.timingSafeEqual(one, wanted));
  });
}

/** Events on disk, each once, whichever deliveries they came in. A shop has a table for it. */
class Inbox {
  constructor(path) {
    const text = fs.existsSync(path) ? fs.readFileSync(path, 'utf8') : '';
    // A last line that was cut off was never answered for: it comes again.
    const whole = text.slice(0, text.lastIndexOf('\n') + 1);
    this.seen = new Set(whole.split('\n').filter(Boolean).map((line) => JSON.parse(line).id));
    if (text) fs.truncateSync(path, Buffer.byteLength(whole));
    this.file = fs.openSync(path, 'a');
  }

  /** Store the events that are new, and return them; they survive a crash from here on. */
  add(events) {
    const fresh = events.filter((event) => !this.seen.has(event.id));
    fs.writeSync(this.file, fresh.map((event) => `${JSON.stringify(event)}\n`).join(''));
    fs.fsyncSync(this.file);
    fresh.forEach((event) => this.seen.add(event.id));
    return fresh;
  }
}

function handle(event) {
  const about = event.order || event.product || {};
  console.log(event.type, about.id === undefined ? '' : about.id);
}

const [port, path] = process.argv.slice(2);
const secrets = process.env.WEBHOOK_SECRET.split(' ').filter(Boolean);
const inbox = new Inbox(path);

const server = http.createServer((request, response) => {
  const chunks = [];
  let size = 0;
  const answer = (status) => response.writeHead(status).end();
  request.on('data', (chunk) => {
    size += chunk.length;
    if (size > MOST_BYTES) return request.destroy();
    chunks.push(chunk);
  });
  request.on('end', () => {
    const body = Buffer.concat(chunks);
    if (request.method !== 'POST') return answer(405);
    if (!isGenuine(request.headers, body, secrets, Date.now() / 1000)) return answer(401);
    const fresh = inbox.add(JSON.parse(body).data.events);
    answer(204); // at once: whoever takes longer than 5 s gets it again
    setImmediate(() => fresh.forEach(handle));
  });
});
server.listen(Number(port), '127.0.0.1', () => console.log('listening', server.address().port));
