// Buy, and know whether it worked: node buy.js URL USER PRODUCT [QUANTITY]
//
// Prints the order id (exit 0), the reason of a refusal (1), or how to go on (3).
// Environment: PATIENCE, seconds to go on trying (90); KEY, to go on with an earlier purchase.

const ANSWER_MS = 5000; // no answer by then: nobody knows the outcome
const FIRST_WAIT_MS = 1000, LONGEST_WAIT_MS = 8000;

// Make one attempt; a status of 0 stands for no answer.
async function post(url, body, key) {
  try {
    const response = await fetch(url, {
      method: "POST",
      headers: { "Content-Type": "application/json", "Idempotency-Key": key },
      body: JSON.stringify(body),
      signal: AbortSignal.timeout(ANSWER_MS),
    });
    const retryAfter = Number(response.headers.get("Retry-After")) || 0;
    return { status: response.status, body: await response.json(), retryAfter };
  } catch {
    return { status: 0, body: {}, retryAfter: 0 };
  }
}

// Attempt until the answer is final; return it, or null if none came. Runs in a browser too.
async function buy(url, purchase, key, patience) {
  const deadline = Date.now() + patience * 1000;
  let longest = FIRST_WAIT_MS;
  for (;;) {
    const answer = await post(`${url}/purchase`, purchase, key);
    if (answer.status >= 200 && answer.status < 500 && answer.status !== 429) return answer;
    // A random part keeps a crowd that failed together from coming back together.
    const wait = Math.random() * longest + answer.retryAfter * 1000;
    longest = Math.min(2 * longest, LONGEST_WAIT_MS);
    if (Date.now() + wait > deadline) return null;
    await new Promise((resolve) => setTimeout(resolve, wait));
  }
}

async function main([url, user, product, quantity = "1", ...more]) {
  const numbers = [product, quantity];
  if (!user || more.length || !numbers.every((number) => /^\d+$/.test(number))) {
    console.error("usage: node buy.js URL USER PRODUCT [QUANTITY]");
    return 2;
  }
  const [productId, units] = numbers.map(Number);
  const key = process.env.KEY || crypto.randomUUID(); // one per intent, the same in every attempt
  const purchase = { userId: user, productId, quantity: units };
  const answer = await buy(url, purchase, key, Number(process.env.PATIENCE || 90));
  if (!answer) {
    const orders = `${url}/purchase/orders/${encodeURIComponent(user)}`;
    console.log(`undecided: go on with KEY=${key}, or see ${orders}`);
    return 3;
  }
  const { status, body } = answer;
  console.log(status === 200 ? body.orderId : `refused: ${body.code || status}`);
  return status === 200 ? 0 : 1;
}

main(process.argv.slice(2)).then((code) => { process.exitCode = code; });
