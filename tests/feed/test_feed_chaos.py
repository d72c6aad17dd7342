"""A reader and a webhook follow the feed while everything that makes it is killed."""

import http.client
import json
import random
import threading
import time
from contextlib import suppress

import psutil
import pytest
from consumer import Consumer
from drills import often
from system import processes, start_system, stop_system
from waiting import wait_until

pytestmark = pytest.mark.drill

KINDS = {
    "web": "web.py",
    "worker": "worker.py",
    "webhooks": "webhooks.py",
    "redis": "valkey-server",
    "postgres": "bin/postgres",
}
PRODUCTS = 3


class Rig:
    """A system, those who use it, and what each of them has seen."""

    def __init__(self, system) -> None:
        self.system = system
        self.bearer = {"Authorization": f"Bearer {system.api_token}"}
        self.over = threading.Event()
        self.bought: list[int] = []
        self.read: list[dict] = []
        self.after: str | None = None

    def call(self, method: str, path: str, body=None) -> tuple[int, dict]:
        """Return status 0 for no answer."""
        try:
            status, _, content, _ = self.system.call(method, path, body, **self.bearer)
            return status, json.loads(content)
        except (OSError, http.client.HTTPException, ValueError):
            return 0, {}

    def buy(self, first: int) -> None:
        user = first
        while not self.over.is_set():
            user += 1
            body = {"userId": user, "productId": 1 + user % PRODUCTS}
            status, answer = self.call("POST", "/purchase", body)
            if status == 200:
                self.bought.append(answer["orderId"])
            else:
                self.over.wait(0.1)

    def cancel(self) -> None:
        choose = random.Random(5)
        while not self.over.is_set():
            if self.bought:
                order = choose.choice(self.bought)
                self.call("POST", f"/orders/{order}/cancel", {"quantity": 1, "reason": "drill"})
            self.over.wait(0.05)

    def follow(self) -> None:
        while not self.over.is_set():
            self.read_page(wait=5)

    def read_page(self, wait: int = 0) -> int:
        after = f"&after={self.after}" if self.after else ""
        path = f"/orders/events?limit=200&wait={wait}{after}"
        status, page = self.call("GET", path)
        if status != 200:
            assert status in (0, 429, 500, 503), page
            time.sleep(0.1)
            return -1
        self.read += page["events"]
        self.after = page["next"]
        return len(page["events"])

    def kill(self, kind: str) -> None:
        victims = processes(self.system.data_dir, KINDS[kind])
        if kind == "postgres":
            # The oldest is the server; its end takes the sessions along.
            victims = victims[:1]
        for victim in victims:
            with suppress(psutil.NoSuchProcess):
                psutil.Process(victim).kill()


def sequences(events: list[dict]) -> dict[int, list[int]]:
    """Return by order the sequence numbers as they first came."""
    found: dict[int, list[int]] = {}
    for event in events:
        if "order" in event:
            seen = found.setdefault(event["order"]["id"], [])
            if event["sequence"] not in seen:
                seen.append(event["sequence"])
    return found


def test_every_step_of_every_order_comes_whoever_is_killed(tmp_path):
    system = start_system(
        tmp_path,
        WEBHOOK_ALLOW_PRIVATE="on",
        PURCHASE_ADDRESS_LIMIT="off",
        LOOKUP_LIMIT="off",
        WEB_WORKERS="2",
    )
    consumer, rig = Consumer(), Rig(system)
    try:
        for _ in range(PRODUCTS - 1):
            product = {"name": "drill", "priceCents": 1, "currency": "USD", "stock": 100_000}
            assert rig.call("POST", "/products", product)[0] == 201
        assert rig.call("POST", "/products/restock", {"productId": 1, "amount": 100_000})[0] == 200
        status, endpoint = rig.call("POST", "/webhooks", {"url": consumer.url})
        assert status == 201
        rig.after = endpoint["after"]
        threads = [
            threading.Thread(target=rig.buy, args=(n * 10**6,), daemon=True) for n in range(1, 4)
        ]
        threads += [threading.Thread(target=act, daemon=True) for act in (rig.cancel, rig.follow)]
        for thread in threads:
            thread.start()
        choose = random.Random(14)
        for turn in range(often(10, 100)):
            kind = list(KINDS)[turn % len(KINDS)]
            before = len(rig.bought)
            rig.kill(kind)
            wait_until(
                lambda before=before: len(rig.bought) > before + 3, 60, f"sales after {kind}"
            )
            time.sleep(choose.uniform(0, 1.5))
        rig.over.set()
        for thread in threads:
            thread.join(60)
        orders = settle(rig)
        check(rig, orders, consumer, endpoint)
    finally:
        rig.over.set()
        consumer.close()
        stop_system(system)


def settle(rig: Rig) -> dict[int, dict]:
    """Wait until everything is stored, and the feed tells what the list does; return the orders."""

    def is_quiet() -> bool:
        status, figures = rig.call("GET", "/purchase/metrics")
        return status == 200 and figures["queue_depth"] == 0

    wait_until(is_quiet, 90, "the drain")
    orders: dict[int, dict] = {}

    def all_told() -> bool:
        # A cancel of an order that was not stored yet (202) is carried out after it is.
        orders.clear()
        orders.update(listed(rig))
        while rig.read_page() > 0:
            pass
        told = {event["order"]["id"]: event["order"] for event in rig.read if "order" in event}
        return told.keys() == orders.keys() and all(
            told[number][member] == order[member]
            for number, order in orders.items()
            for member in ("status", "cancelledQuantity")
        )

    wait_until(all_told, 60, "the feed")
    return orders


def listed(rig: Rig) -> dict[int, dict]:
    """Return all orders as the list shows them."""
    orders: dict[int, dict] = {}
    cursor = ""
    while cursor is not None:
        status, page = rig.call("GET", f"/orders?limit=500{cursor}")
        assert status == 200, page
        orders |= {order["id"]: order for order in page["orders"]}
        cursor = f"&cursor={page['next']}" if page.get("next") else None
    return orders


def check(rig: Rig, orders: dict[int, dict], consumer: Consumer, endpoint: dict) -> None:
    lost = set(rig.bought) - orders.keys()
    assert not lost, f"answered 200, not listed: {sorted(lost)[:10]}"
    numbers = [int(event["id"].rpartition("-")[2]) for event in rig.read]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers))), "skipped or twice"
    seen = sequences(rig.read)
    assert seen.keys() == orders.keys()
    for order_id, steps in seen.items():
        assert steps == list(range(len(steps))), f"order {order_id}"
    assert any(len(steps) > 1 for steps in seen.values())

    def all_sent() -> bool:
        rig.call("PATCH", f"/webhooks/{endpoint['id']}", {"url": consumer.url})  # due at once
        return {e["id"] for e in rig.read} <= {e["id"] for e in consumer.events}

    wait_until(all_sent, 60, "the webhook")
    consumer.verify(endpoint["secret"])
    assert sequences(consumer.events) == seen
    # A message that came twice was the same both times.
    contents = {}
    for headers, body in consumer.received:
        assert contents.setdefault(headers["webhook-id"], body) == body
