"""The checkout of docs/clients: against localstripe, and against a Stripe that fails at will."""

import hashlib
import hmac
import itertools
import json
import random
import sys
import threading
import time
import urllib.parse
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import psycopg2
import pytest
from client import free_port
from system import end, spawn
from waiting import wait_until

from app.config import ROOT
from app.run.embedded import PostgresServer

# The library takes half a second to import, which those that run other files do without.
sys.path.append(str(ROOT / "docs" / "clients"))

SECRET = "whsec_test"
users = itertools.count(random.randrange(10**9, 2**52))


class FakeStripe:
    """Payment intents. The next call of a path that has a fault is done or not, and not answered.

    What the path is refused with instead: a status and an error.
    """

    def __init__(self):
        self.intents: dict[str, dict] = {}
        self.keys: dict[str, str] = {}
        self.faults: list[tuple[str, bool]] = []
        self.refusals: dict[str, tuple[int, dict]] = {}

    def call(self, path: str, form: dict[str, str], key: str | None) -> tuple[int, dict]:
        parts = path.strip("/").split("/")[2:]
        if not parts:
            if key in self.keys:
                return 200, self.intents[self.keys[key]]
            if form["payment_method"] == "pm_card_chargeDeclined":
                return 402, {"error": {"type": "card_error", "code": "card_declined"}}
            name = f"pi_{len(self.intents) + 1}"
            self.intents[name] = {
                "id": name,
                "object": "payment_intent",
                "status": "requires_capture",
                "amount": int(form["amount"]),
                "metadata": {"order": form["metadata[order]"]},
            }
            self.keys[key or name] = name
            return 200, self.intents[name]
        intent = self.intents[parts[0]]
        if len(parts) == 2:
            if intent["status"] != "requires_capture":
                return 400, {"error": {"type": "invalid_request_error", "message": "not so"}}
            intent["status"] = {"capture": "succeeded", "cancel": "canceled"}[parts[1]]
        return 200, intent


@pytest.fixture
def fake():
    """A Stripe of ours, and a client of it."""
    service = FakeStripe()

    class Handler(BaseHTTPRequestHandler):
        def answer(self):
            length = int(self.headers.get("Content-Length") or 0)
            form = dict(urllib.parse.parse_qsl(self.rfile.read(length).decode()))
            path = urllib.parse.urlsplit(self.path).path
            fault = next((f for f in service.faults if path.endswith(f[0])), None)
            if fault:
                service.faults.remove(fault)
            status, body = 500, {}
            refused = next((end for end in service.refusals if path.endswith(end)), None)
            if refused:
                status, body = service.refusals.pop(refused)
            elif fault is None or fault[1]:
                status, body = service.call(path, form, self.headers.get("Idempotency-Key"))
            if fault:
                self.close_connection = True
                return
            text = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST = answer

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    service.client = client_of(server.server_port)
    yield service
    server.shutdown()
    thread.join()
    server.server_close()


def client_of(port: int):
    import stripe

    address = f"http://127.0.0.1:{port}"
    return stripe.StripeClient("sk_test_1", base_addresses={"api": address}, max_network_retries=0)


@pytest.fixture
def sell(server):
    """Hold one unit of a product of its own; returns what the purchase answered."""
    token = {"Authorization": f"Bearer {server.api_token}"}
    body = {"name": "Paid", "priceCents": 1999, "currency": "EUR", "stock": 1, "holdSeconds": 600}
    product = json.loads(server.call("POST", "/products", body, **token)[2])["id"]

    def purchase():
        wanted = {"userId": next(users), "productId": product, "quantity": 1}
        status, _, content, _ = server.call("POST", "/purchase", wanted)
        return status, json.loads(content)

    def stored(order):
        found = json.loads(server.call("GET", f"/orders/{order}", **token)[2])
        return found if found["storedAt"] else None

    purchase.stored = stored
    return purchase


def lapse(server, order: int) -> None:
    """Let an order's hold end now, and wait until it has."""
    url = PostgresServer(server.data_dir).url.replace("+psycopg2", "")
    connection = psycopg2.connect(url)
    try:
        with connection, connection.cursor() as cursor:
            cursor.execute("UPDATE orders SET held_until = now() WHERE id = %s", (order,))
        wait_until(lambda: status_in(connection, order) == "EXPIRED", what="the hold's end")
    finally:
        connection.close()


def status_in(connection, order: int) -> str:
    with connection, connection.cursor() as cursor:
        cursor.execute("SELECT status FROM orders WHERE id = %s", (order,))
        return cursor.fetchone()[0]


def signed(body: bytes, at: int | None = None) -> str:
    at = int(time.time()) if at is None else at
    digest = hmac.new(SECRET.encode(), b"%d." % at + body, hashlib.sha256).hexdigest()
    return f"t={at},v1={digest}"


def event(intent: str, kind: str = "payment_intent.amount_capturable_updated") -> bytes:
    inner = {"object": {"id": intent, "object": "payment_intent"}}
    return json.dumps({"id": "evt_1", "object": "event", "type": kind, "data": inner}).encode()


def checkout_of(server, client):
    from checkout import Checkout

    return Checkout(server.url, server.api_token, client, SECRET)


def test_what_is_confirmed_is_captured_once(server, sell, fake):
    checkout = checkout_of(server, fake.client)
    held = sell()[1]
    for _ in range(2):
        assert checkout.pay(held, 1, "pm_card_visa") == "paid"
    (intent,) = fake.intents.values()
    assert (intent["status"], intent["amount"]) == ("succeeded", 1999)
    order = wait_until(lambda: sell.stored(held["orderId"]), what="the order")
    wait_until(lambda: sell.stored(held["orderId"])["status"] == "CONFIRMED", what="its payment")
    assert sell.stored(held["orderId"])["payment"] == intent["id"]
    assert order["id"] == held["orderId"]


def test_no_money_moves_for_a_hold_that_is_lost(server, sell, fake):
    checkout = checkout_of(server, fake.client)
    held = sell()[1]
    wait_until(lambda: sell.stored(held["orderId"]), what="the order")
    lapse(server, held["orderId"])
    status, other = wait_until(lambda: (a := sell())[0] == 200 and a, what="the unit, free again")
    assert (status, other["status"]) == (200, "held")
    assert checkout.pay(held, 1, "pm_card_visa") == "lost"
    assert [intent["status"] for intent in fake.intents.values()] == ["canceled"]


@pytest.mark.parametrize("done", [True, False])
@pytest.mark.parametrize("path", ["/v1/payment_intents", "/capture"])
def test_a_lost_answer_is_settled_by_the_next_try(server, sell, fake, path, done):
    from checkout import TryAgain

    checkout = checkout_of(server, fake.client)
    held = sell()[1]
    fake.faults.append((path, done))
    with pytest.raises(TryAgain):
        checkout.pay(held, 1, "pm_card_visa")
    assert checkout.pay(held, 1, "pm_card_visa") == "paid"
    assert [intent["status"] for intent in fake.intents.values()] == ["succeeded"]


RATE_LIMIT = 429, {"error": {"type": "invalid_request_error", "code": "rate_limit"}}


@pytest.mark.parametrize("path", ["/v1/payment_intents", "/capture"])
def test_who_asks_stripe_too_often_tries_again(server, sell, fake, path):
    from checkout import TryAgain

    checkout = checkout_of(server, fake.client)
    held = sell()[1]
    fake.refusals[path] = RATE_LIMIT
    with pytest.raises(TryAgain):
        checkout.pay(held, 1, "pm_card_visa")
    body = event("pi_1")
    if fake.intents:
        fake.refusals["/pi_1"] = RATE_LIMIT
        with pytest.raises(TryAgain):
            checkout.webhook(body, signed(body))
    assert checkout.pay(held, 1, "pm_card_visa") == "paid"
    assert [intent["status"] for intent in fake.intents.values()] == ["succeeded"]


def test_a_payment_that_is_cancelled_meanwhile_gives_the_unit_back(server, sell, fake):
    """By somebody at Stripe, or because its authorisation has lapsed."""
    checkout = checkout_of(server, fake.client)
    held = sell()[1]
    wait_until(lambda: sell.stored(held["orderId"]), what="the order")
    act = checkout.act

    def cancelled_meanwhile(order, name, body, key):
        answer = act(order, name, body, key)
        fake.intents["pi_1"]["status"] = "canceled"
        return answer

    checkout.act = cancelled_meanwhile
    assert checkout.pay(held, 1, "pm_card_visa") == "lost"
    assert sell.stored(held["orderId"])["status"] == "CANCELLED"
    assert sell()[0] == 200


def test_other_payments_of_the_account_are_left_alone(server, fake):
    other = {"object": "payment_intent", "status": "requires_capture", "metadata": {}}
    fake.intents["pi_9"] = {"id": "pi_9"} | other
    body = event("pi_9")
    checkout_of(server, fake.client).webhook(body, signed(body))
    assert fake.intents["pi_9"]["status"] == "requires_capture"


def test_webhooks_come_twice_late_and_in_any_order(server, sell, fake):
    from checkout import TryAgain

    checkout = checkout_of(server, fake.client)
    held = sell()[1]
    # The checkout dies right after the authorisation.
    fake.faults.append(("/v1/payment_intents", True))
    with pytest.raises(TryAgain):
        checkout.pay(held, 1, "pm_card_visa")
    body = event("pi_1")
    with pytest.raises(ValueError, match="signed"):
        checkout.webhook(body, signed(body + b" "))
    with pytest.raises(ValueError, match="signed"):
        checkout.webhook(body, signed(body, at=int(time.time()) - 3600))
    assert fake.intents["pi_1"]["status"] == "requires_capture"
    later = event("pi_1", "payment_intent.succeeded")
    for each in (later, body, body, later):
        checkout.webhook(each, signed(each))
    assert fake.intents["pi_1"]["status"] == "succeeded"


def test_a_declined_card_leaves_the_hold_for_another(server, sell, fake):
    checkout = checkout_of(server, fake.client)
    held = sell()[1]
    assert checkout.pay(held, 1, "pm_card_chargeDeclined") == "declined"
    assert checkout.pay(held, 1, "pm_card_visa") == "paid"


@contextmanager
def localstripe():
    from stripe import APIConnectionError

    port = free_port()
    process = spawn([sys.executable, "-m", "localstripe", "--port", str(port), "--from-scratch"])
    try:
        client = client_of(port)

        def answers():
            try:
                return client.v1.customers.list() is not None
            except APIConnectionError:
                return False

        wait_until(answers, what="localstripe")
        yield client
    finally:
        end(process)


def test_the_happy_path_with_localstripe(server, sell):
    with localstripe() as client:
        card = {"number": "4242424242424242", "exp_month": 12, "exp_year": 2030, "cvc": "123"}
        method = client.v1.payment_methods.create({"type": "card", "card": card}).id
        assert checkout_of(server, client).pay(sell()[1], 1, method) == "paid"
        (intent,) = client.v1.payment_intents.list().data
        assert (intent.status, intent.amount) == ("succeeded", 1999)
