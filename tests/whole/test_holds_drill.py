"""Ten thousand shoppers, of whom a third never pay; and kills between hold and payment.

Every unit ends sold and paid, or free.
"""

import http.client
import itertools
import json
import os
import random
import signal
import sys
import threading
import time
import urllib.parse
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import psycopg2
import pytest
from drills import often
from system import Server, processes, run_program, start_system, stop_system
from waiting import patience, wait_until

from app.run.embedded import PostgresServer

SHOPPERS = 10_000
UNITS = 3_000
HOLD_SECONDS = 30
CLIENTS = 16
STATES = """
SELECT count(*) FILTER (WHERE status = 'CONFIRMED'), count(*) FILTER (WHERE status = 'HELD'),
       count(*) FILTER (WHERE status = 'EXPIRED'), count(*), count(DISTINCT user_id)
FROM orders WHERE product_id = %s
"""


class Crowd:
    """Shoppers over some connections that are kept open."""

    def __init__(self, server, product: int) -> None:
        self.server, self.product = server, product
        self.local = threading.local()
        self.refused = Counter()
        self.paid: set[int] = set()
        self.unpaid: set[int] = set()

    def call(self, path: str, body: dict, **headers: str) -> tuple[int, dict]:
        if not hasattr(self.local, "connection"):
            url = urllib.parse.urlsplit(self.server.url)
            seconds = patience(30)
            self.local.connection = http.client.HTTPConnection(url.netloc, timeout=seconds)
        content = {"Content-Type": "application/json"}
        try:
            self.local.connection.request("POST", path, json.dumps(body), content | headers)
            response = self.local.connection.getresponse()
        except ConnectionError:
            # Idle for too long, it was closed; the key makes a second request harmless.
            self.local.connection.close()
            self.local.connection.request("POST", path, json.dumps(body), content | headers)
            response = self.local.connection.getresponse()
        return response.status, json.loads(response.read())

    def shop(self, user: int) -> bool:
        """Buy, and pay unless one is of the third that don't; tell whether a unit may yet come."""
        body = {"userId": user, "productId": self.product}
        status, answer = self.call("/purchase", body, **{"Idempotency-Key": "cart"})
        if status != 200:
            self.refused[answer["code"]] += 1
            return bool(answer.get("mayReturn"))
        order = answer["orderId"]
        if user % 3 == 0:
            self.unpaid.add(order)
            return False
        token = {"Authorization": f"Bearer {self.server.api_token}", "Idempotency-Key": f"{order}"}
        path, paid = f"/orders/{order}/confirm", {"payment": f"pi_{order}"}
        deadline = time.monotonic() + patience(20)
        status = 503
        # A busy PostgreSQL may be too slow once: the same key again tells what came of it.
        while status == 503 and time.monotonic() < deadline:
            status, answer = self.call(path, paid, **token)
        assert status in (200, 202), answer
        self.paid.add(order)
        return False


def held_product(server: Server) -> int:
    """Put UNITS on sale that are held for HOLD_SECONDS; return the product."""
    body = {"name": "Rush", "priceCents": 1, "currency": "EUR", "stock": UNITS}
    body["holdSeconds"] = HOLD_SECONDS
    token = {"Authorization": f"Bearer {server.api_token}"}
    return json.loads(server.call("POST", "/products", body, **token)[2])["id"]


@pytest.mark.drill
def test_a_third_never_pays(tmp_path):
    server = start_system(
        tmp_path, PURCHASE_ADDRESS_LIMIT="off", PURCHASE_USER_LIMIT="off", LOOKUP_LIMIT="off"
    )
    connection = psycopg2.connect(PostgresServer(tmp_path).url.replace("+psycopg2", ""))
    connection.autocommit = True
    try:
        product = held_product(server)
        crowd = Crowd(server, product)
        hopeful = list(range(1, SHOPPERS + 1))
        with ThreadPoolExecutor(CLIENTS) as pool, connection.cursor() as cursor:
            deadline = time.monotonic() + patience(300)
            while hopeful:
                assert time.monotonic() < deadline
                again = pool.map(crowd.shop, hopeful)
                # Of those who don't mean to pay nobody comes twice.
                hopeful = [
                    user for user, hope in zip(hopeful, again, strict=True) if hope and user % 3
                ]
                if hopeful:
                    # Who was told that units may return comes again when some did.
                    wait_until(
                        lambda: free(server, product) or not held(cursor, product),
                        seconds=2 * HOLD_SECONDS,
                        what="units that return",
                    )
            wait_until(lambda: not held(cursor, product), 2 * HOLD_SECONDS, "the last ends")
            cursor.execute(STATES, (product,))
            confirmed, _, expired, every, shoppers = cursor.fetchone()
            cursor.execute("SELECT id FROM orders WHERE status = 'CONFIRMED'")
            assert {row[0] for row in cursor.fetchall()} == crowd.paid
        assert confirmed + free(server, product) == UNITS
        assert (confirmed, expired) == (len(crowd.paid), len(crowd.unpaid))
        assert every == shoppers == confirmed + expired
        assert crowd.refused["sold_out"] > 0
    finally:
        connection.close()
        stop_system(server)


def held(cursor, product: int) -> int:
    cursor.execute(STATES, (product,))
    in_state = cursor.fetchone()[1]
    return int(in_state)


def free(server, product: int) -> int:
    content = server.call("GET", f"/purchase/metrics?productId={product}")[2]
    figures = json.loads(content)
    return figures["stock_remaining"] if figures["queue_depth"] == 0 else 0


# What a shopper does about an order, and how often out of a hundred.
ACTS = {"confirm": 25, "release": 40, "extend": 15, "leave": 20}
# What an order may have become, by the act and the status of its answer; see below for a confirm.
ENDS = {
    ("confirm", 200): {"CONFIRMED"},
    ("confirm", 202): {"CONFIRMED"},
    ("confirm", 409): {"EXPIRED"},
    # One that was asked for too late is left as it is.
    ("release", 200): {"RELEASED", "EXPIRED"},
    ("release", 202): {"RELEASED"},
    ("extend", 200): {"EXPIRED"},
    ("extend", 202): {"EXPIRED"},
    ("extend", 409): {"EXPIRED"},
    ("leave", 0): {"EXPIRED"},
}
VICTIMS = {
    "web": ["web.py"],
    "worker": ["worker.py"],
    "redis": ["valkey-server"],
    "postgres": ["/postgres", "-D"],
}


class Persistent:
    """Shoppers who ask again, with the same key, until they know."""

    def __init__(self, server, product: int) -> None:
        self.server, self.product = server, product
        self.users = itertools.count(1)
        self.stopped = threading.Event()
        # By order: the act, and the status and the code of its last answer.
        self.told: dict[int, tuple[str, int, str]] = {}

    def ask(self, path: str, body: dict, key: str) -> tuple[int, dict]:
        """Return what is answered in the end; a server error says nothing."""
        token = {"Authorization": f"Bearer {self.server.api_token}", "Idempotency-Key": key}
        deadline = time.monotonic() + patience(90)
        while True:
            try:
                status, _, content, _ = self.server.call("POST", path, body, **token)
                if status < 500:
                    return status, json.loads(content)
            except (OSError, http.client.HTTPException):
                pass
            assert time.monotonic() < deadline, path
            self.stopped.wait(0.1)

    def shop(self, seed: int) -> None:
        choose = random.Random(seed)
        while not self.stopped.wait(choose.uniform(0, 0.2)):
            user = next(self.users)
            body = {"userId": user, "productId": self.product, "quantity": choose.randint(1, 2)}
            status, answer = self.ask("/purchase", body, f"cart-{user}")
            if status != 200:
                assert (status, answer["code"]) in {
                    (409, "sold_out"), (409, "insufficient_stock"), (409, "order_ended"),
                }, answer  # fmt: skip
                continue
            order = answer["orderId"]
            (act,) = choose.choices(list(ACTS), list(ACTS.values()))
            self.told[order] = (act, 0, "")
            if act != "leave":
                wanted = {"extend": {"seconds": 2}, "confirm": {"payment": f"pi-{order}"}}
                path = f"/orders/{order}/{act}"
                status, answer = self.ask(path, wanted.get(act, {}), f"{act}-{order}")
                self.told[order] = (act, status, answer.get("code", ""))


@pytest.mark.drill
@pytest.mark.parametrize("shards", ["1", "6"])
def test_kills_between_hold_and_payment(tmp_path, shards):
    server = start_system(
        tmp_path,
        PURCHASE_ADDRESS_LIMIT="off",
        PURCHASE_USER_LIMIT="off",
        LOOKUP_LIMIT="off",
        WEB_WORKERS="2",
        SHARDS=shards,
    )
    try:
        product = held_product(server)
        crowd = Persistent(server, product)
        choose = random.Random(1)
        with ThreadPoolExecutor(8) as pool:
            shoppers = [pool.submit(crowd.shop, seed) for seed in range(8)]
            try:
                for kind in [*VICTIMS] * often(4, 40):
                    time.sleep(choose.uniform(0.5, 2.5))
                    words = VICTIMS[kind]
                    victims = wait_until(lambda: processes(tmp_path, *words), what=kind)  # noqa: B023
                    os.kill(choose.choice(victims), signal.SIGKILL)
            finally:
                crowd.stopped.set()
            for shopper in shoppers:
                shopper.result()

        def orders() -> dict[int, tuple[str, int]]:
            with psycopg2.connect(url) as connection, connection.cursor() as cursor:
                query = "SELECT id, status, quantity FROM orders WHERE product_id = %s"
                cursor.execute(query, (product,))
                return {row[0]: row[1:] for row in cursor.fetchall()}

        url = PostgresServer(tmp_path).url.replace("+psycopg2", "")
        wait_until(lambda: server.call("GET", "/readyz")[0] == 200, 60, "recovery")
        left = HOLD_SECONDS + 60 + 30
        wait_until(lambda: "HELD" not in {status for status, _ in orders().values()}, left, "ends")
        found = orders()
        wrong = {
            order: (told, found.get(order))
            for order, told in crowd.told.items()
            if order not in found or found[order][0] not in ENDS.get(told[:2], set())
        }
        assert wrong == {}
        refused = {code for act, status, code in crowd.told.values() if act == "confirm" and code}
        assert refused <= {"hold_expired"}
        assert found.keys() == crowd.told.keys()
        paid = sum(quantity for status, quantity in found.values() if status == "CONFIRMED")
        assert paid + free(server, product) == UNITS
        assert {act for act, _, _ in crowd.told.values()} == set(ACTS)
        proof = run_program(
            [sys.executable, "-m", "flask", "ledger", "check"],
            60,
            DATA_DIR=str(tmp_path),
            SHARDS=shards,
        )
        assert proof.returncode == 0, proof.stdout + proof.stderr
    finally:
        stop_system(server)
