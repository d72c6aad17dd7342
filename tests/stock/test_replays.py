"""What a purchase that comes again under its key is told, also long after its order has ended."""

import uuid

import pytest
from occupied import occupy
from sqlalchemy import func, select

from app.audit import CLI
from app.books import recovery
from app.extensions import db, stock
from app.models import Order
from app.orders import cancelling, deadletters
from app.orders.drain import drain_batch
from app.problems import Unprepared
from app.stock.entries import STANDING
from app.stock.keys import KEYS
from app.stock.moves import Ended

FAILED = {"code": "order_ended", "orderId": 1, "orderStatus": "FAILED"}
ENDED = {"code": "order_ended", "orderId": 1, "orderStatus": "CANCELLED"}


@pytest.fixture
def context(app):
    with app.app_context():
        yield


def told(answer) -> dict:
    assert answer.headers["Idempotent-Replayed"] == "true"
    return {name: answer.json[name] for name in ENDED}


@pytest.mark.parametrize("user", [7, "auth0|7"])
def test_a_cancelled_order_s_key_says_so_and_takes_no_unit(context, buy, drain, user):
    first = buy(user, key="k")
    drain()
    assert buy(user, key="k").json == first.json
    cancelling.cancel(1, "test", CLI)
    again = buy(user, key="k")
    assert again.status_code == 409
    assert told(again) == ENDED
    # Another purchase under the key is still another purchase; and a new key buys again.
    assert buy(user, key="k", quantity=2).status_code == 422
    assert stock.view([1]).products[1]["free"] == 100
    assert buy(user, key="l").json["orderId"] == 2
    # A rebuild knows it too.
    stock.client.flushdb()
    recovery.rebuild(CLI)
    assert told(buy(user, key="k")) == ENDED


def test_an_order_of_the_former_version_that_is_cancelled(context, buy, drain):
    first = buy(7, key="k")
    drain()
    stock.client.hdel(*KEYS.idempotency(7, "k"))
    stock.client.set(KEYS.former_idempotency(7, "k"), "1 1 1", px=60_000)
    # What it said of the price is not known any more.
    replay = buy(7, key="k")
    assert (replay.status_code, replay.json) == (200, {"status": "queued", "orderId": 1})
    assert first.json["orderId"] == 1
    cancelling.cancel(1, "test", CLI)
    assert told(buy(7, key="k")) == ENDED
    assert stock.client.hget(*KEYS.idempotency(7, "k")) == "1 - - CANCELLED 1 1"
    assert stock.client.exists(KEYS.former_idempotency(7, "k")) == 0


def test_a_dead_letter_that_is_given_up(context, buy, drain):
    occupy(1)
    buy(7, key="k")
    drain()
    (letter,) = deadletters.list_letters()
    assert told(buy(7, key="k")) == FAILED
    deadletters.abandon([letter.id], "test", CLI)
    assert told(buy(7, key="k")) == ENDED


@pytest.mark.parametrize(("user", "former"), [(7, False), (7, True), ("auth0|7", False)])
def test_a_dead_letter_fails_until_it_is_stored_after_all(context, buy, drain, user, former):
    occupy(1)
    body = {"reference": "cart-7"} if user != 7 else {}
    first = buy(user, key="k", **body)
    if former:
        stock.client.hdel(*KEYS.idempotency(7, "k"))
        stock.client.set(KEYS.former_idempotency(7, "k"), "1 1 1", px=60_000)
    drain()
    assert told(buy(user, key="k", **body)) == FAILED
    assert buy(user, key="k", quantity=3, **body).status_code == 422
    # A rebuild says the same.
    recovery.rebuild(CLI)
    assert told(buy(user, key="k", **body)) == FAILED
    assert told(buy(user, key="k", **body)) == FAILED
    (letter,) = deadletters.list_letters()
    (done,) = deadletters.replay([letter.id], "test", CLI)
    assert done.done
    again = buy(user, key="k", **body)
    assert (again.status_code, again.json) == (200, first.json | {"orderId": letter.replayed_as})


def test_a_drain_that_was_cut_off_marks_what_nobody_has_decided_since(context, buy, monkeypatch):
    occupy(1)
    buy(7, key="k")
    settle = stock.first.settle
    monkeypatch.setattr(stock.first, "settle", lambda *batch: False)
    drain_batch("test", "test")
    (letter,) = deadletters.list_letters()
    # Whose entry still waits, and so would be marked later, is not stored yet.
    (refused,) = deadletters.replay([letter.id], "test", CLI)
    assert not refused.done
    assert refused.message == "A worker is still at it; try again in a second."
    assert db.session.scalar(select(func.count()).select_from(Order)) == 1
    deadletters.abandon([letter.id], "test", CLI)
    assert told(buy(7, key="k")) == ENDED
    monkeypatch.setattr(stock.first, "settle", settle)
    drain_batch("test", "test")
    assert stock.waiting() == 0
    assert told(buy(7, key="k")) == ENDED


def test_a_replay_is_refused_while_redis_holds_no_sale(context, buy, drain):
    occupy(1)
    buy(7, key="k")
    drain()
    (letter,) = deadletters.list_letters()
    stock.first.close(stock.generation())
    with pytest.raises(Unprepared):
        deadletters.replay([letter.id], "test", CLI)
    db.session.rollback()
    assert letter.resolution is None
    recovery.rebuild(CLI)
    assert told(buy(7, key="k")) == FAILED


def test_a_movement_changes_the_record_of_its_own_order_only(context, buy):
    buy(7, key="k")
    generation = stock.generation()
    assert stock.move(generation, 900, 1, 1, 7, Ended("k", 2, "CANCELLED"))[0] == "applied"
    assert buy(7, key="k").status_code == 200
    assert stock.move(generation, 901, 1, 1, 7, Ended("k", 1, "EXPIRED"))[0] == "applied"
    assert told(buy(7, key="k")) == ENDED | {"orderStatus": "EXPIRED"}
    # And once more changes nothing; units taken again let the order stand again.
    assert stock.move(generation, 901, 1, 1, 7, Ended("k", 1, STANDING))[0] == "repeated"
    assert stock.move(generation, 902, 1, -1, 7, Ended("k", 1, STANDING))[0] == "applied"
    assert buy(7, key="k").json["orderId"] == 1


def test_a_price_in_force_and_a_reference_are_part_of_it(buy, client):
    right = buy(7, key="k", expectedPriceCents=99_999, reference="cart-7")
    assert (right.json["unitPriceCents"], right.json["currency"]) == (99_999, "USD")
    # The key is for this cart; the expected price is none of its business.
    assert buy(7, key="k", expectedPriceCents=1, reference="cart-7").json == right.json
    assert buy(7, key="k").status_code == 422
    changed = buy(7, expectedPriceCents=1)
    assert changed.status_code == 409
    assert changed.json["code"] == "price_changed"
    assert changed.json["priceCents"] == 99_999
    # It counts as an attempt.
    assert changed.headers["RateLimit"].startswith('"user";r=3')


def test_bytes_of_a_key(app):
    """61 for an order with a UUID as its key; three times that under a name of its own."""
    orders = 2560
    stock.client.hset(KEYS.product(1), "free", orders)
    stock.client.config_set("appendfsync", "no")
    try:
        for user in range(1_000_064, 1_000_064 + orders):
            stock.claim(user, 1, 1, str(uuid.UUID(int=user)), f"192.0.2.{user % 250}")
    finally:
        stock.client.config_set("appendfsync", "always")
    names = {KEYS.idempotency(user, "k")[0] for user in range(1_000_064, 1_000_064 + orders)}
    assert sum(stock.client.hlen(name) for name in names) == orders
    assert sum(stock.client.memory_usage(name, samples=0) for name in names) / orders < 80
    assert {stock.client.ttl(name) for name in names} == {-1}
