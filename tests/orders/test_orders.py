"""Looking up orders: at once, in order, complete, and never twice."""

import threading
from datetime import UTC, datetime

import pytest
from crowd import at_once
from sqlalchemy.exc import OperationalError

from app.audit import CLI
from app.extensions import db, stock
from app.models import Order
from app.orders import cancelling as orders
from app.orders.drain import drain_batch
from app.problems import Conflict
from app.stock.keys import KEYS
from app.web import api


def ids(answer):
    return [order["id"] for order in answer.json]


def test_nobody_has_no_orders(client):
    answer = client.get("/purchase/orders/12345")
    assert (answer.status_code, answer.json) == (200, [])


def test_newest_first_with_pages_across_queued_and_stored(client, buy, drain):
    for _ in range(3):
        buy(7)
    drain()
    buy(7)
    buy(7)
    listed = client.get("/purchase/orders/7").json
    assert [(order["id"], order["status"]) for order in listed] == [
        (5, "QUEUED"), (4, "QUEUED"), (3, "CONFIRMED"), (2, "CONFIRMED"), (1, "CONFIRMED"),
    ]  # fmt: skip
    assert list(listed[0]) == [
        "id", "status", "quantity", "productId", "createdAt", "unitPriceCents", "currency",
    ]  # fmt: skip
    assert listed[0]["createdAt"].endswith("Z")
    assert ids(client.get("/purchase/orders/7?limit=2")) == [5, 4]
    assert ids(client.get("/purchase/orders/7?limit=2&before=4")) == [3, 2]
    assert ids(client.get("/purchase/orders/7?before=5")) == [4, 3, 2, 1]
    assert ids(client.get("/purchase/orders/7?before=1")) == []


def test_ids_of_different_length_keep_their_order(client, buy):
    for user in range(1, 9):
        buy(user)
    for _ in range(3):
        buy(50)
    assert ids(client.get("/purchase/orders/50")) == [11, 10, 9]


def test_without_postgresql_what_waits_is_told_beside_the_error(client, buy, monkeypatch):
    """An incomplete list would look like a lost order."""
    buy(1)
    away = OperationalError("SELECT", {}, Exception("away"))
    monkeypatch.setattr(api.orders, "orders_of", lambda *_: (_ for _ in ()).throw(away))
    answer = client.get("/purchase/orders/1")
    assert (answer.status_code, answer.json["code"]) == (503, "unavailable")
    assert [(order["id"], order["status"]) for order in answer.json["queued"]] == [(1, "QUEUED")]


def test_read_between_commit_and_trim_shows_an_order_once(client, buy, app, monkeypatch):
    buy(1)
    with app.app_context():
        monkeypatch.setattr(stock.first, "settle", lambda *arguments: False)
        drain_batch("test", "test")
    listed = client.get("/purchase/orders/1").json
    assert [(order["id"], order["status"]) for order in listed] == [(1, "CONFIRMED")]


def test_never_missing_while_the_drain_runs(app, drain):
    """Look an order up again and again while orders move from Redis to PostgreSQL."""
    client = app.test_client()
    wrong, stopped = [], threading.Event()

    def watch():
        reader = app.test_client()
        while not stopped.is_set():
            # Taken before the look-up: these must all be listed, each once.
            expected = list(bought)
            listed = ids(reader.get("/purchase/orders/77"))
            if not set(expected) <= set(listed) or len(listed) != len(set(listed)):
                wrong.append((expected, listed))

    bought = []
    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(40):
        stock.client.delete(*KEYS.attempts)
        bought.append(client.post("/purchase", json={"userId": 77, "productId": 1}).json["orderId"])
        drain()
    stopped.set()
    watcher.join()
    assert len(bought) == 40
    assert wrong == []


def test_cancel_gives_the_units_back_once(client, buy, drain, app):
    buy(1, quantity=3)
    drain()
    with app.app_context():
        orders.cancel(1, "wrong size", CLI)
        with pytest.raises(Conflict):
            orders.cancel(1, "again", CLI)
    assert client.get("/purchase/orders/1").json[0]["status"] == "CANCELLED"
    assert client.get("/purchase/metrics").json["stock_remaining"] == 100


def test_two_cancel_at_once(buy, drain, app):
    buy(1, quantity=3)
    drain()

    def attempt(_):
        with app.app_context():
            try:
                return orders.cancel(1, "twice", CLI).status
            except Conflict:
                return "refused"

    assert sorted(at_once(attempt, range(4))) == ["CANCELLED", "refused", "refused", "refused"]
    assert stock.view([1]).products[1]["free"] == 100


def test_cancelling_frees_the_users_cap(client, buy, drain, app, admin_headers):
    client.patch("/products/1", json={"perUserLimit": 2}, headers=admin_headers)
    buy(1, quantity=2)
    drain()
    assert buy(1).json["code"] == "purchase_limit"
    with app.app_context():
        orders.cancel(1, "returned", CLI)
    assert buy(1).status_code == 200


def test_a_dead_letter_is_listed_as_failed(client, buy, drain, app):
    """The id was taken by another order: nothing is dropped silently."""
    taken = Order(
        id=1,
        user_id=99,
        product_id=1,
        quantity=1,
        unit_price_cents=1,
        currency="USD",
        claimed_at=datetime.now(UTC),
    )
    with app.app_context():
        db.session.add(taken)
        db.session.commit()
    buy(5)
    assert drain() == 0
    listed = client.get("/purchase/orders/5").json
    assert [(order["id"], order["status"]) for order in listed] == [(1, "FAILED")]
    assert client.get("/purchase/metrics").json["queue_depth"] == 0
