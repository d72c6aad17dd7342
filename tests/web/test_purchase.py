"""POST /purchase: the documented answers, one by one."""

import struct
import time
from datetime import UTC, datetime, timedelta

import pytest
from waiting import patience

from app.config import NO_LIMIT, RateLimit
from app.extensions import stock
from app.stock.claims import Claim
from app.stock.keys import KEYS

BOUGHT = {"status": "queued", "orderId": 1, "unitPriceCents": 99_999, "currency": "USD"}


def change(client, headers, product_id=1, **terms):
    answer = client.patch(f"/products/{product_id}", json=terms, headers=headers)
    assert answer.status_code == 200, answer.json
    return answer.json


def test_sells_and_persists(client, buy, drain):
    answer = buy(1)
    assert (answer.status_code, answer.json) == (200, BOUGHT)
    assert answer.headers["RateLimit-Policy"] == '"user";q=5;w=60'
    assert answer.headers["RateLimit"] == '"user";r=4;t=60'
    assert client.get("/purchase/orders/1").json[0]["status"] == "QUEUED"
    assert drain() == 1
    (order,) = client.get("/purchase/orders/1").json
    assert (order["id"], order["status"], order["quantity"]) == (1, "CONFIRMED", 1)
    metrics = client.get("/purchase/metrics").json
    assert metrics == {"stock_remaining": 99, "queue_depth": 0, "total_processed": 1}


def test_quantity_defaults_to_one(client):
    assert client.post("/purchase", json={"userId": 1, "productId": 1}).status_code == 200
    assert client.get("/purchase/metrics").json["stock_remaining"] == 99


def test_sold_out_and_insufficient(client, buy):
    for user in range(1, 10):
        assert buy(user, quantity=10).status_code == 200
    assert buy(10, quantity=8).status_code == 200
    answer = buy(11, quantity=3)
    assert (answer.status_code, answer.json) == (
        409,
        {"error": "Stock problem", "code": "insufficient_stock", "remaining": 2},
    )
    assert buy(12, quantity=2).status_code == 200
    answer = buy(13)
    assert (answer.status_code, answer.json) == (
        409,
        {"error": "Stock problem", "code": "sold_out"},
    )
    assert answer.headers["RateLimit"] == '"user";r=4;t=60'


def test_unknown_product(buy):
    answer = buy(1, product_id=77)
    assert (answer.status_code, answer.json) == (
        404,
        {"error": "Unknown product", "code": "unknown_product"},
    )


def test_before_and_after_the_window(client, buy, admin_headers):
    now = datetime.now(UTC)
    opens = (now + timedelta(minutes=5)).replace(microsecond=0)
    change(client, admin_headers, opensAt=opens.isoformat())
    answer = buy(1)
    assert answer.status_code == 409
    assert (answer.json["error"], answer.json["code"]) == ("Sale not open", "not_open")
    assert datetime.fromisoformat(answer.json["opensAt"]) == opens
    assert 290 <= int(answer.headers["Retry-After"]) <= 301

    past = (now - timedelta(minutes=5)).isoformat()
    change(client, admin_headers, opensAt=None, closesAt=past)
    assert buy(1).json == {"error": "Sale not open", "code": "ended"}


def test_when_to_come_again_is_told_by_redis_clock_whatever_this_machine_s_says(app):
    opens = int((datetime.now(UTC) + timedelta(hours=1)).timestamp() * 1000)
    _, _, headers = app.extensions["lane"].tell(Claim(b"not_open", opens, 5, 60_000, b"1001"))
    assert ("Retry-After", "2") in headers


def test_pause_binds_the_next_purchase(client, buy, admin_headers):
    change(client, admin_headers, paused=True)
    answer = buy(1)
    assert (answer.status_code, answer.json) == (
        409,
        {"error": "Sale not open", "code": "paused"},
    )
    change(client, admin_headers, paused=False)
    assert buy(1).status_code == 200


def test_cap_for_each_user(client, buy, admin_headers):
    assert buy(1, quantity=2).status_code == 200
    change(client, admin_headers, perUserLimit=3)
    # What was bought before the cap counts too.
    answer = buy(1, quantity=2)
    assert (answer.status_code, answer.json) == (
        409,
        {"error": "Purchase limit reached", "code": "purchase_limit"},
    )
    assert buy(1).status_code == 200
    assert buy(1).json["code"] == "purchase_limit"
    assert buy(2, quantity=3).status_code == 200


def test_maximum_quantity_is_the_products_own(client, buy, admin_headers):
    answer = buy(1, quantity=11)
    assert (answer.status_code, answer.json["field"]) == (400, "quantity")
    change(client, admin_headers, maxQuantity=20)
    assert buy(1, quantity=11).status_code == 200


def test_five_attempts_a_minute(buy, client):
    for left in (4, 3, 2, 1, 0):
        assert f"r={left};" in buy(1).headers["RateLimit"]
    for _ in range(5):
        answer = buy(1)
        assert (answer.status_code, answer.json) == (
            429,
            {"error": "Too many requests", "code": "rate_limited", "limit": "user"},
        )
        seconds = int(answer.headers["Retry-After"])
        assert 1 <= seconds <= 60
        assert answer.headers["RateLimit"] == f'"user";r=0;t={seconds}'
    assert buy(2).status_code == 200
    assert client.get("/purchase/metrics").json["stock_remaining"] == 94


def test_the_window_slides(make_app):
    """The sixth attempt passes as soon as the first is older than the window, not at its turn."""
    app = make_app(purchase_user_limit=RateLimit(2, 1000))
    client = app.test_client()
    body = {"userId": 1, "productId": 1}

    def attempt():
        return client.post("/purchase", json=body)

    first = datetime.now(UTC)
    assert attempt().status_code == attempt().status_code == 200
    while (answer := attempt()).status_code == 429:
        assert datetime.now(UTC) - first < timedelta(seconds=patience(3))
        time.sleep(0.05)
    assert answer.status_code == 200
    assert datetime.now(UTC) - first >= timedelta(seconds=0.95)


def test_a_clock_that_was_set_back_locks_nobody_out(buy):
    """Attempts from the future are forgotten: else a user would wait for the clock to catch up."""
    ahead = time.time() + 3600
    stamps = b"".join(struct.pack(">d", ahead * 1000 + number) for number in range(5))
    counted = struct.pack(">ddd", ahead // 60, 3000, 3000)
    for turn in (ahead // 120, time.time() // 120):
        for key in KEYS.attempts:
            attempts = {"": struct.pack(">ddd", turn, 0, 1), "u1": stamps, "a127.0.0.1": counted}
            stock.raw_client.hset(key, mapping=attempts)
        answer = buy(1)
        stock.client.delete(*KEYS.attempts)
    assert answer.status_code == 200
    assert answer.headers["RateLimit"] == '"user";r=4;t=60'


def test_limits_can_be_turned_off(make_app):
    client = make_app(purchase_user_limit=NO_LIMIT, purchase_address_limit=NO_LIMIT).test_client()
    for _ in range(20):
        answer = client.post("/purchase", json={"userId": 1, "productId": 1})
        assert answer.status_code == 200
        assert "RateLimit" not in answer.headers


def test_address_limit_counts_all_users_of_an_address(make_app):
    client = make_app(purchase_address_limit=RateLimit(3, 60_000)).test_client()

    def attempt(user, address):
        return client.post(
            "/purchase",
            json={"userId": user, "productId": 1},
            environ_base={"REMOTE_ADDR": address},
        )

    assert [attempt(user, "10.0.0.1").status_code for user in (1, 2, 3)] == [200] * 3
    answer = attempt(4, "10.0.0.1")
    assert (answer.status_code, answer.json["code"]) == (429, "rate_limited")
    assert answer.headers["RateLimit-Policy"] == '"address";q=3;w=60'
    assert 1 <= int(answer.headers["Retry-After"]) <= 120
    assert attempt(4, "10.0.0.2").status_code == 200


def test_a_full_outbox_refuses_at_no_cost(make_app):
    client = make_app(outbox_limit=1).test_client()
    assert client.post("/purchase", json={"userId": 1, "productId": 1}).status_code == 200
    answer = client.post("/purchase", json={"userId": 2, "productId": 1})
    assert (answer.status_code, answer.json["code"]) == (503, "unavailable")
    assert answer.headers["Retry-After"] == "1"
    assert client.get("/purchase/metrics").json["stock_remaining"] == 99


def test_replay_answers_the_same_and_costs_nothing(buy, client, drain):
    first = buy(1, key="k-1")
    assert "Idempotent-Replayed" not in first.headers
    for _ in range(7):
        again = buy(1, key="k-1")
        assert (again.status_code, again.data) == (200, first.data)
        assert again.headers["Idempotent-Replayed"] == "true"
    assert "r=3;" in buy(1).headers["RateLimit"]
    assert client.get("/purchase/metrics").json["stock_remaining"] == 98
    assert drain() == 2


def test_a_key_belongs_to_one_request_of_one_user(buy):
    assert buy(1, key="k").json["orderId"] == 1
    answer = buy(1, quantity=2, key="k")
    assert (answer.status_code, answer.json) == (
        422,
        {
            "error": "Idempotency-Key was used with another request",
            "code": "idempotency_mismatch",
        },
    )
    assert buy(2, key="k").json["orderId"] == 2


def test_a_refused_purchase_does_not_use_up_its_key(client, buy, admin_headers):
    change(client, admin_headers, paused=True)
    assert buy(1, key="k").status_code == 409
    change(client, admin_headers, paused=False)
    assert buy(1, key="k").status_code == 200


@pytest.mark.parametrize("method", ["get", "put", "patch", "delete", "head", "options"])
def test_wrong_method(client, method):
    answer = getattr(client, method)("/purchase")
    assert answer.status_code == 405
    assert answer.headers["Allow"] == "POST"
    if method != "head":
        assert answer.json["code"] == "method_not_allowed"


def test_the_price_of_the_moment_is_kept(client, buy, admin_headers, drain, app):
    buy(1)
    change(client, admin_headers, priceCents=5)
    buy(2)
    drain()
    from app.extensions import db
    from app.models import Order

    with app.app_context():
        prices = [
            (order.unit_price_cents, order.currency)
            for order in db.session.query(Order).order_by(Order.id)
        ]
    assert prices == [(99_999, "USD"), (5, "USD")]
