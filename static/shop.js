// A shop's page, whole: what is on sale, the countdown, buying, and the order turning confirmed.
//
// It uses public routes alone (see /docs). What makes it safe to use in a rush:
// * One Idempotency-Key for each intent, kept until the answer is final, over a reload, too: a
//   second click, a lost answer or a closed lid never buys twice.
// * No answer, or a 5xx, is no refusal: the same request is sent again, with the same key.
// * Whoever has to wait does so as long as told (Retry-After), and a random part longer.
// * A token that has expired is no refusal either: after signing in the same request goes on.
// * The price that was shown goes along, so nobody buys at another one.
// * The countdown goes by the server's clock, not by this device's.
//
// Where a product is held until it is paid for (holdSeconds), the page tells how much time is left,
// and what has become of the order. It takes no payment, and must not be able to: to confirm a hold
// takes an API token, which never leaves the shop's own server. That lets the shopper pay there, and
// confirms the hold: docs/clients/checkout.py.

// How old the shown stock may be. Opening and end need no question: the countdown knows them. A page
// for a crowd asks less often, or a cache in front of /products.
const PRODUCTS_MS = 10_000;
const ORDERS_MS = 1000; // ... and an order that is on its way
const HELD_MS = 3000; // ... and one that is being paid for
const ANSWER_MS = 5000; // no answer by then: nobody knows the outcome
const FIRST_WAIT_MS = 1000,
  LONGEST_WAIT_MS = 8000,
  PATIENCE_MS = 90_000;

const $ = (selector) => document.querySelector(selector);
const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
const some = (ms) => ms * (0.75 + Math.random() / 2); // a crowd must not ask in step
// crypto.randomUUID is there on https alone.
const random = (bytes) =>
  [...crypto.getRandomValues(new Uint8Array(bytes))]
    .map((byte) => byte.toString(16).padStart(2, "0"))
    .join("");

// Who buys. Without SHOPPER_AUTH=jwt the page makes somebody up. With it the server asks for the
// token that the shop's sign-in gives (docs/api.md), and says in `data-claim` which of its claims
// names the shopper: this page lets it be pasted, a real shop has it already.
const { claim } = document.body.dataset;

// Only read here, so as to show it and to ask for one's own orders: the server verifies it.
function shopperOf(token) {
  try {
    const part = token.split(".")[1].replaceAll("-", "+").replaceAll("_", "/");
    const bytes = Uint8Array.from(atob(part), (letter) => letter.charCodeAt(0));
    const value = JSON.parse(new TextDecoder().decode(bytes))[claim];
    return ["string", "number"].includes(typeof value) ? String(value) : "";
  } catch {
    return "";
  }
}

if (!claim) localStorage.user ??= `visitor-${random(4)}`;
const user = claim ? shopperOf(sessionStorage.token ?? "") : localStorage.user;
const auth = claim && user ? { Authorization: `Bearer ${sessionStorage.token}` } : {};

// --- Asking

let ahead = 0; // the server's clock less this device's, in ms

// A status of 0 stands for no answer.
async function ask(path, { method = "GET", headers = {}, body } = {}) {
  try {
    const response = await fetch(path, {
      method,
      headers: { ...auth, ...headers },
      body,
      cache: "no-store",
      signal: AbortSignal.timeout(ANSWER_MS),
    });
    ahead = (Date.parse(response.headers.get("Date")) || Date.now()) - Date.now();
    const retryAfter = Number(response.headers.get("Retry-After")) || 0;
    return { status: response.status, body: await response.json(), retryAfter };
  } catch {
    return { status: 0, body: {}, retryAfter: 0 };
  }
}

const now = () => Date.now() + ahead;

// --- Buying

// What the shopper wants, as it was when the button was pressed, and its key. It is kept until the
// answer is final, so that a reload goes on with it.
const intents = {
  name: (productId) => `intent-${user}-${productId}`,
  load: (productId) => JSON.parse(sessionStorage.getItem(intents.name(productId))),
  keep: (productId, intent) =>
    sessionStorage.setItem(intents.name(productId), JSON.stringify(intent)),
  drop: (productId) => sessionStorage.removeItem(intents.name(productId)),
};

// Send the intent until its answer is final; return that, or null if none came. `waits` is told how
// many seconds will pass before the next attempt.
async function buy({ key, purchase }, waits) {
  const deadline = Date.now() + PATIENCE_MS;
  let longest = FIRST_WAIT_MS;
  for (;;) {
    const answer = await ask("/purchase", {
      method: "POST",
      headers: { "Content-Type": "application/json", "Idempotency-Key": key },
      body: JSON.stringify(purchase),
    });
    if (answer.status >= 200 && answer.status < 500 && ![408, 429].includes(answer.status))
      return answer;
    const wait = Math.random() * longest + answer.retryAfter * 1000;
    longest = Math.min(2 * longest, LONGEST_WAIT_MS);
    if (Date.now() + wait > deadline) return null;
    waits(Math.ceil(wait / 1000), answer.status);
    await sleep(wait);
  }
}

const REFUSALS = {
  sold_out: ({ mayReturn }) =>
    mayReturn ? "All are held by others. Some may come back: look again soon." : "Sold out.",
  insufficient_stock: ({ remaining }) => `Only ${remaining} left: take fewer.`,
  not_open: () => "It has not opened yet.",
  paused: () => "The sale is paused. Try again in a moment.",
  ended: () => "The sale is over.",
  purchase_limit: () => "You have bought as much of it as one shopper may.",
  price_changed: ({ priceCents, currency }) =>
    `It costs ${money(priceCents, currency)} now. Buy again if you like.`,
  order_ended: () => "That order has ended since.",
  unknown_product: () => "It is not on sale any more.",
};

function told({ status, body }) {
  if (status === 200 && body.status === "held")
    return `It is held for you: order ${body.orderId}. Pay for it in time.`;
  if (status === 200) return `It is yours: order ${body.orderId}.`;
  if (status === 401) return signIn(body.error);
  return (REFUSALS[body.code] ?? (() => body.error ?? "That did not work."))(body);
}

// --- What is shown

const digits = {}; // of each currency's minor unit, as the API tells it

function money(amount, currency) {
  const shown = { style: "currency", currency };
  const known = digits[currency] ?? 2;
  shown.minimumFractionDigits = shown.maximumFractionDigits = known;
  return new Intl.NumberFormat(undefined, shown).format(amount / 10 ** known);
}

function left(ms) {
  const seconds = Math.max(0, Math.ceil(ms / 1000));
  const [days, hours, minutes] = [86400, 3600, 60].map((unit) => Math.floor(seconds / unit));
  if (days) return `${days} d ${hours % 24} h`;
  return [hours, minutes % 60, seconds % 60].map((n) => String(n).padStart(2, "0")).join(":");
}

// What the next purchase would meet, in the order in which the server checks it.
function stateOf(product) {
  const opens = Date.parse(product.opensAt ?? 0) - now(),
    closes = Date.parse(product.closesAt ?? "");
  if (closes <= now()) return { words: "Over" };
  if (product.paused || product.braked) return { words: "Paused" };
  if (opens > 0) return { words: `Opens in ${left(opens)}` };
  if (product.stockRemaining <= 0) return { words: "Sold out" };
  const ends = closes - now() < 86_400_000 ? ` · ends in ${left(closes - now())}` : "";
  return { words: `${product.stockRemaining.toLocaleString()} left${ends}`, open: true };
}

const cards = new Map(); // by product id: the element, the product, and whether it is being bought

function cardOf(product) {
  if (cards.has(product.id)) return cards.get(product.id);
  const element = $("#product").content.firstElementChild.cloneNode(true);
  const card = { element, product, busy: false };
  const part = (selector) => element.querySelector(selector);
  Object.assign(card, {
    title: part("h2"),
    price: part(".price"),
    state: part(".state"),
    told: part(".told"),
  });
  Object.assign(card, { quantity: part("select"), button: part("button") });
  part("form").addEventListener("submit", (event) => {
    event.preventDefault();
    const { id, priceCents } = card.product;
    const purchase = {
      userId: user,
      productId: id,
      quantity: Number(card.quantity.value),
      expectedPriceCents: priceCents,
    };
    if (!card.busy) carryOut(card, { key: random(16), purchase });
  });
  cards.set(product.id, card);
  $("#products").append(element);
  // Of the time before a reload: its outcome is still open.
  const intent = intents.load(product.id);
  if (intent) carryOut(card, intent);
  return card;
}

async function carryOut(card, intent) {
  const { id } = card.product;
  intents.keep(id, intent);
  card.busy = true;
  card.told.textContent = "Buying …";
  draw(card);
  const answer = await buy(intent, (seconds, status) => {
    const why = status === 429 ? "You have tried often" : "The shop does not answer";
    card.told.textContent = `${why}: trying again in ${seconds} s.`;
  });
  const isFinal = answer && answer.status !== 401;
  if (isFinal) intents.drop(id);
  card.told.textContent = answer
    ? told(answer)
    : "No answer. Reload the page to go on: you can't buy it twice.";
  card.busy = !isFinal;
  await Promise.all([showProducts(), showOrders()]);
}

function draw(card) {
  const { product } = card;
  const state = stateOf(product);
  card.title.textContent = product.name;
  card.price.textContent = money(product.priceCents, product.currency);
  card.state.textContent = state.words;
  card.element.classList.toggle("open", Boolean(state.open));
  card.button.disabled = card.busy || !state.open || !user;
  card.button.setAttribute("aria-label", `Buy ${product.name}`);
  const most = Math.min(product.maxQuantity, product.perUserLimit ?? 10, 10);
  if (card.quantity.length !== most)
    card.quantity.replaceChildren(
      ...Array.from({ length: most }, (_, n) => new Option(String(n + 1))),
    );
}

async function showProducts() {
  const { status, body, retryAfter } = await ask("/products?limit=100");
  $("#trouble").hidden = status === 200;
  if (status !== 200) {
    $("#trouble").textContent = "The shop does not answer. Trying again …";
    return retryAfter;
  }
  for (const product of body) {
    digits[product.currency] = product.currencyDigits;
    const card = cardOf(product);
    card.product = product;
    draw(card);
  }
  for (const [id, card] of cards) {
    if (card.busy || body.some((product) => product.id === id)) continue;
    card.element.remove();
    cards.delete(id);
  }
  $("#nothing").hidden = cards.size > 0;
  drawOrders(); // which are called by their products' names
}

// Each status of an order in words.
const STATUSES = {
  QUEUED: { words: () => "Yours. It is being written down …" },
  HELD: { words: () => "Held for you", left: toPay },
  CONFIRMED: { words: () => "Confirmed" },
  CANCELLED: { words: () => "Cancelled" },
  RELEASED: { words: () => "Given up" },
  // A payment that is late may bring it back: the shop's server tells the shopper.
  EXPIRED: { words: () => "Not paid in time" },
  FAILED: { words: () => "Yours, and somebody is looking into it" },
};

// A payment counts as long as the order is held, so what comes after the end is for the server to say.
function toPay({ heldUntil }) {
  const ends = Date.parse(heldUntil) - now();
  return ends > 0 ? `: pay within ${left(ends)}` : ": the time to pay is over …";
}

let orders = [];

async function showOrders() {
  if (!user) return 0;
  const path = `/purchase/orders/${encodeURIComponent(user)}?limit=20`;
  const { status, body, retryAfter } = await ask(path);
  if (status === 200) orders = body;
  // 400: its claim holds what can be nobody's name.
  if (status === 401 || status === 400) signIn(body.error);
  drawOrders();
  return retryAfter;
}

function drawOrders() {
  const list = $("#orders");
  for (const order of [...orders].reverse()) {
    let item = document.getElementById(`order-${order.id}`);
    if (!item) {
      item = document.createElement("li");
      item.id = `order-${order.id}`;
      item.append(document.createElement("span"), document.createElement("span"));
      // A countdown is not read out at each second.
      item.lastChild.setAttribute("role", "timer");
      item.lastChild.setAttribute("aria-live", "off");
      list.prepend(item);
    }
    const name = cards.get(order.productId)?.product.name ?? `product ${order.productId}`;
    const status = STATUSES[order.status] ?? { words: () => order.status };
    const words = status.words(order);
    const text = `Order ${order.id} · ${order.quantity} × ${name} · ${money(order.quantity * order.unitPriceCents, order.currency)} · ${words}`;
    // Only what has changed is read out.
    if (item.firstChild.textContent !== text) item.firstChild.textContent = text;
    item.lastChild.textContent = status.left?.(order) ?? "";
    item.className = order.status.toLowerCase();
  }
  $("#no-orders").hidden = orders.length > 0;
}

// --- Signing in, with SHOPPER_AUTH=jwt

// Ask for a token, and say why; return what to say of a purchase that waits for it.
function signIn(why) {
  if (!claim) return why;
  $("#known").hidden = true;
  $("#sign-in").hidden = false;
  $("#refused").textContent = why;
  return "Sign in, and it goes on.";
}

if (claim) {
  $("#sign-in").hidden = Boolean(user);
  $("#sign-in").addEventListener("submit", (event) => {
    event.preventDefault();
    const token = $("#token").value.trim();
    if (!shopperOf(token)) return signIn(`This is no token with the claim ${claim}.`);
    sessionStorage.token = token;
    location.reload();
  });
}
$("#known").hidden = !user;

// --- Going on

// `show` returns how many seconds it was told to wait, if it was.
async function again(show, wait) {
  for (;;) {
    const longer = document.hidden ? 0 : await show();
    await sleep(some(wait) + (longer || 0) * 1000);
  }
}

$("#user").textContent = user;
$("#other").addEventListener("click", () => {
  delete localStorage.user;
  delete sessionStorage.token;
  location.reload();
});
again(showProducts, PRODUCTS_MS);
const anyIs = (status) => orders.some((order) => order.status === status);
again(() => anyIs("QUEUED") && showOrders(), ORDERS_MS);
again(() => anyIs("HELD") && showOrders(), HELD_MS);
setInterval(() => {
  cards.forEach(draw);
  if (anyIs("HELD")) drawOrders();
}, 500);
showOrders();
