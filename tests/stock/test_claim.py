"""The claim itself: exact under concurrency, one round trip, and never sent twice."""

from collections import Counter

import pytest
import redis
from counts import commandstats
from crowd import at_once
from sqlalchemy import event, func, select

from app.extensions import db, stock
from app.models import Order
from app.problems import Unavailable
from app.stock.keys import KEYS

THREADS = 100


def test_a_hundred_threads_on_the_last_units(app, drain):
    assert stock.claim(9001, 1, 10, None, "a").outcome == b"accepted"
    for user in range(9002, 9010):
        assert stock.claim(user, 1, 10, None, "a").outcome == b"accepted"
    claims = at_once(lambda user: stock.claim(user, 1, 1, None, "a"), range(1, THREADS + 1))
    outcomes = Counter(claim.outcome for claim in claims)
    assert outcomes == {b"accepted": 10, b"sold_out": 90}
    sold = {claim.detail for claim in claims if claim.outcome == b"accepted"}
    assert sold == set(range(10, 20))
    assert stock.view([1]).products[1]["free"] == 0
    assert drain() == 19
    with app.app_context():
        rows = db.session.execute(select(Order.id, Order.user_id, Order.quantity)).all()
    winners = {
        (claim.detail, user, 1)
        for user, claim in enumerate(claims, start=1)
        if claim.outcome == b"accepted"
    }
    assert {tuple(row) for row in rows if row.id >= 10} == winners
    assert sum(row.quantity for row in rows) == 100


def test_one_key_a_hundred_times_at_once(app):
    claims = at_once(lambda _: stock.claim(1, 1, 2, "same", "a"), range(THREADS))
    assert Counter(claim.outcome for claim in claims) == {b"accepted": 1, b"replayed": THREADS - 1}
    assert {claim.detail for claim in claims} == {1}
    assert stock.view([1]).products[1]["free"] == 98


def test_one_user_a_hundred_times_at_once(app):
    claims = at_once(lambda _: stock.claim(1, 1, 1, None, "a"), range(THREADS))
    assert Counter(claim.outcome for claim in claims) == {b"accepted": 5, b"limited": THREADS - 5}


def test_a_cap_holds_under_concurrency(app, admin_headers):
    app.test_client().patch("/products/1", json={"perUserLimit": 3}, headers=admin_headers)
    claims = at_once(lambda _: stock.claim(1, 1, 1, None, "a"), range(5))
    assert Counter(claim.outcome for claim in claims) == {b"accepted": 3, b"capped": 2}


def test_concurrent_restocks_and_claims_lose_no_unit(app):
    from app.audit import CLI
    from app.products import movements

    def act(number):
        if number % 10:
            return stock.claim(number, 1, 1, None, "a").outcome
        with app.app_context():
            movements.restock(1, 7, None, CLI)
        return b"restocked"

    outcomes = Counter(at_once(act, range(1, THREADS + 1)))
    assert outcomes == {b"accepted": 90, b"restocked": 10}
    assert stock.view([1]).products[1]["free"] == 100 - 90 + 70


def test_one_round_trip_and_no_other_call(app, client, monkeypatch):
    """A purchase costs one command and one answer on the wire, and nothing of RQ or SQL."""
    client.post("/purchase", json={"userId": 1, "productId": 1})
    sent = []
    original = redis.connection.AbstractConnection.send_packed_command

    def watched(self, command, check_health=True):
        sent.extend(command)
        return original(self, command, check_health)

    def no_sql(*arguments, **options):
        raise AssertionError("SQL on the request path")

    before = commandstats()
    with monkeypatch.context() as patch, app.app_context():
        patch.setattr(redis.connection.AbstractConnection, "send_packed_command", watched)
        event.listen(db.engine, "before_cursor_execute", no_sql)
        try:
            answer = client.post("/purchase", json={"userId": 2, "productId": 1})
        finally:
            event.remove(db.engine, "before_cursor_execute", no_sql)
    assert answer.status_code == 200
    (command,) = sent
    assert b"EVALSHA" in command
    after = commandstats()
    called = {name: after[name] - before.get(name, 0) for name in after}
    assert called["evalsha"] == 1
    assert not any(called.get(name) for name in ("script|load", "hello", "auth", "eval"))


def test_a_flushed_script_is_loaded_again(app):
    assert stock.claim(1, 1, 1, None, "a").outcome == b"accepted"
    stock.client.script_flush()
    assert stock.claim(2, 1, 1, None, "a").outcome == b"accepted"
    assert stock.view([1]).products[1]["accepted"] == 2


def test_a_redis_without_the_sale_sells_nothing(app, buy):
    stock.client.delete(KEYS.generation)
    answer = buy(1)
    assert (answer.status_code, answer.json["code"]) == (503, "unavailable")
    assert "Retry-After" in answer.headers
    assert "RateLimit" not in answer.headers


def test_a_cut_answer_is_unknown_and_not_sent_again(app, monkeypatch):
    """The command ran, its answer was lost: one unit is taken, not two, and a replay tells."""
    assert stock.claim(1, 1, 1, None, "a").outcome == b"accepted"
    original = redis.connection.AbstractConnection.read_response
    cut = []

    def lose_one(self, *arguments, **options):
        answer = original(self, *arguments, **options)
        if not cut:
            cut.append(answer)
            self.disconnect()
            raise redis.ConnectionError("cut")
        return answer

    monkeypatch.setattr(redis.connection.AbstractConnection, "read_response", lose_one)
    with pytest.raises(Unavailable):
        stock.claim(2, 1, 1, "key", "a")
    monkeypatch.undo()
    assert stock.view([1]).products[1]["accepted"] == 2
    # For a quarter of a second requests are refused at once; then one tries again.
    with pytest.raises(Unavailable):
        stock.claim(2, 1, 1, "key", "a")
    stock.thread_line.breaker.answered()
    assert stock.claim(2, 1, 1, "key", "a")[:2] == (b"replayed", 2)


def test_rows_equal_claims(app, client, drain):
    """What the claims answered and what PostgreSQL stores afterwards is the same set."""
    answered = {}
    for user in range(1, 61):
        quantity = user % 3 + 1
        answer = client.post(
            "/purchase", json={"userId": user, "productId": 1, "quantity": quantity}
        )
        if answer.status_code == 200:
            answered[answer.json["orderId"]] = (user, quantity)
    drain()
    with app.app_context():
        rows = {
            order.id: (order.user_id, order.quantity) for order in db.session.scalars(select(Order))
        }
        units = db.session.scalar(select(func.sum(Order.quantity)))
    assert rows == answered
    assert units + stock.view([1]).products[1]["free"] == 100
