"""The feed: every step of every order once, in its own order, whoever commits late."""

import json
import threading
import time
from datetime import date, timedelta

import pytest
from psycopg2 import errors
from sqlalchemy import text
from waiting import patience, wait_until

from app.audit import CLI
from app.books import recovery
from app.events import Happened, add
from app.extensions import db, stock
from app.feed import numbering, reading
from app.locks import EVENTS_LOCK
from app.orders import cancelling, deadletters, expiry, holds, listing
from app.orders.drain import drain_batch
from app.products import movements
from app.products.observed import Observer


@pytest.fixture
def number(app):
    """Number everything that is committed, as a worker does."""

    def run() -> int:
        given = 0
        with app.app_context():
            numberer = numbering.Numberer()
            while numberer.run_once():
                pass
            given = reading.ends().head
            db.session.remove()
        return given

    return run


@pytest.fixture
def feed(client, admin_headers):
    """Ask for events; return the answer."""

    def ask(after: str | None = None, **query):
        query |= {"after": after} if after is not None else {}
        return client.get("/orders/events", query_string=query, headers=admin_headers)

    return ask


def follow(feed, limit: int = 1000) -> list[dict]:
    """Return all events from the beginning, page by page."""
    events, after = [], None
    while True:
        page = feed(after, limit=limit).json
        events += page["events"]
        if not page["events"]:
            return events
        assert page["next"] == page["events"][-1]["id"]
        after = page["next"]


def test_a_batch_is_as_many_events_as_it_has_orders(app, buy, drain, number, feed):
    for user in range(1, 8):
        buy(user, reference=f"cart-{user}")
    drain()
    number()
    for limit in (1, 2, 3, 7, 100):
        events = follow(feed, limit)
        assert [event["order"]["id"] for event in events] == list(range(1, 8)), limit
    assert {event["type"] for event in events} == {"order.confirmed"}
    assert {event["sequence"] for event in events} == {0}
    assert events[2]["order"]["reference"] == "cart-3"
    assert events[2]["order"]["userId"] == "3"
    assert len({event["id"] for event in events}) == 7


def test_an_event_tells_the_order_as_it_was_then(app, buy, drain, number, feed):
    buy(1)
    drain()
    with app.app_context():
        cancelling.cancel(1, "asked for", CLI)
    number()
    stored, cancelled = follow(feed)[:2]
    assert (stored["type"], stored["order"]["status"]) == ("order.confirmed", "CONFIRMED")
    assert (cancelled["type"], cancelled["order"]["status"]) == ("order.cancelled", "CANCELLED")
    assert (stored["sequence"], cancelled["sequence"]) == (0, 1)
    assert cancelled["reason"] == "asked for"


def test_a_product_is_called_as_it_was_when_it_was_sold(
    app, client, admin_headers, buy, drain, number, feed
):
    buy(1)
    drain()
    body = {"name": "Renamed"}
    assert client.patch("/products/1", json=body, headers=admin_headers).status_code == 200
    buy(2)
    waiting = client.get("/orders/2", headers=admin_headers).json
    drain()
    with app.app_context():
        cancelling.cancel(1, "asked for", CLI)
    number()
    told = [(event["type"], event["order"]["productName"]) for event in follow(feed)]
    former, now = "Flash-sale item", "Renamed"
    assert told == [
        ("order.confirmed", former), ("order.confirmed", now), ("order.cancelled", former)
    ]  # fmt: skip
    listed = client.get("/orders", headers=admin_headers).json["orders"]
    assert [order["productName"] for order in listed] == [now, former]
    assert waiting["productName"] == now


def test_holds_that_end_together_are_an_event_for_each(
    app, client, admin_headers, buy, drain, number, feed
):
    """As the end left each of them, in SQL's words; whatever is done with it later."""
    body = {"holdSeconds": 300}
    assert client.patch("/products/1", json=body, headers=admin_headers).status_code == 200
    for user in (7, 8, 9):
        buy(user)
    buy("anna@example.com", quantity=2, reference='cart"\\9"', key="k")
    drain()
    with app.app_context():
        holds.extend(2, 9, CLI)
        db.session.execute(text("UPDATE orders SET held_until = now() - interval '10 s'"))
        db.session.commit()
        assert expiry.expire(10) == 4
        shown = {order: listing.one(order) for order in (1, 2, 3, 4)}
        acts = dict(db.session.execute(text("SELECT id, acts FROM orders")).all())
        db.session.rollback()
    body = {"name": "Renamed"}
    assert client.patch("/products/1", json=body, headers=admin_headers).status_code == 200
    number()
    with app.app_context():
        # Paid too late, it stands again, and is cancelled.
        assert holds.confirm(holds.Confirm(3, CLI, "late")).reclaimed
        cancelling.cancel(3, "asked for", CLI)
    buy(10)
    drain()
    number()
    whole = follow(feed)
    ended = [event for event in whole if event["type"] == "order.expired"]
    assert [event["order"]["id"] for event in ended] == [1, 2, 3, 4]
    for event in ended:
        told = event["order"]
        assert told == {name: shown[told["id"]][name] for name in told}
        assert list(told) == list(shown[told["id"]])[: len(told)]
        assert event["sequence"] == acts[told["id"]]
    assert acts == {1: 1, 2: 2, 3: 1, 4: 1}
    for limit in (1, 2, 3, 5):
        assert follow(feed, limit) == whole
    with app.app_context():
        for order in (1, 2, 3, 4, 5):
            mine = [event for event in whole if event.get("order", {}).get("id") == order]
            assert [json.loads(event.json) for event in reading.of_order(order)] == mine
            assert [event["sequence"] for event in mine] == list(range(len(mine)))


def test_small_batches_come_in_their_order(app, buy, drain, number, feed):
    for user in range(1, 7):
        buy(user)
        if user % 2:
            drain()
        if user == 3:
            number()
            with app.app_context():
                cancelling.cancel(1, "asked for", CLI)
    drain()
    number()
    whole = follow(feed)
    stored = [e["order"]["id"] for e in whole if e["type"] == "order.confirmed"]
    assert stored == [1, 2, 3, 4, 5, 6]
    for limit in (1, 2, 3, 5):
        assert follow(feed, limit) == whole


def test_nothing_that_commits_late_is_jumped_over(app, buy, drain, number, feed):
    """The transaction that took the lower id commits last; a reader who is ahead still sees it."""
    with app.app_context(), db.engine.connect() as late:
        late.execute(
            text("INSERT INTO new_events (type, body) VALUES ('order.held', '{\"a\": 1}')")
        )
        add([Happened("order.released", {"b": 1})])
        db.session.commit()
        number()
        page = feed().json
        assert [event["type"] for event in page["events"]] == ["order.released"]
        assert not feed(page["next"]).json["events"]
        late.commit()
    number()
    assert [event["type"] for event in feed(page["next"]).json["events"]] == ["order.held"]


def test_an_act_never_gets_a_number_before_its_order(app, buy, drain, number, feed, monkeypatch):
    """The order is stored and cancelled after the numberer has looked at what happened."""
    buy(1)
    plain = numbering.NUMBER_BATCHES

    class Cursor:
        def __init__(self, cursor):
            self.cursor = cursor

        def __getattr__(self, name):
            return getattr(self.cursor, name)

        def execute(self, statement, values=None):
            if statement == plain:
                with app.app_context():
                    drain_batch("test", "test")
                    cancelling.cancel(1, "at once", CLI)
            return self.cursor.execute(statement, values)

    number_all = numbering._number
    monkeypatch.setattr(numbering, "_number", lambda cursor, *of: number_all(Cursor(cursor), *of))
    with app.app_context():
        add([Happened("order.released", {"b": 1})])
        db.session.commit()
    number()
    monkeypatch.undo()
    number()
    types = [event["type"] for event in follow(feed) if event.get("order")]
    assert types == ["order.confirmed", "order.cancelled"]


def test_one_writer(app, buy, drain):
    with app.app_context(), db.engine.connect() as other:
        add([Happened("order.released", {"b": 1})])
        db.session.commit()
        other.execute(text(f"SELECT pg_advisory_xact_lock({EVENTS_LOCK})"))
        assert numbering.number_events() is None
        other.rollback()
        numbering.keep_partitions()
        assert numbering.number_events().given == 1


def test_many_writers_and_numberers_at_once(app, number, feed):
    """Each "order" is changed by many threads under a lock; its events keep their sequence."""
    orders, changes = 5, 30
    locks = {order: threading.Lock() for order in range(orders)}
    counts = dict.fromkeys(range(orders), 0)
    with app.app_context():
        numbering.keep_partitions()
    stop = threading.Event()

    def change(worker: int) -> None:
        with app.app_context():
            for turn in range(changes):
                order = (worker + turn) % orders
                with locks[order]:
                    counts[order] += 1
                    add([Happened("order.cancelled", {"order": {}}, order + 1, counts[order])])
                    db.session.commit()

    def count() -> None:
        with app.app_context():
            while not stop.is_set():
                numbering.number_events()

    writers = [threading.Thread(target=change, args=(worker,)) for worker in range(6)]
    numberers = [threading.Thread(target=count) for _ in range(2)]
    for thread in (*writers, *numberers):
        thread.start()
    for thread in writers:
        thread.join()
    stop.set()
    for thread in numberers:
        thread.join()
    number()
    seen: dict[int, list[int]] = {}
    numbers = []
    with app.app_context():
        of = reading.ends()
        page = reading.read(0, 1000, of)
        for event in page.events:
            numbers.append(event.number)
        rows = db.session.execute(text("SELECT order_id, sequence FROM events ORDER BY number"))
        for order, sequence in rows:
            seen.setdefault(order, []).append(sequence)
    assert numbers == list(range(1, 6 * changes + 1))
    assert all(seen[order] == list(range(1, len(seen[order]) + 1)) for order in seen)


@pytest.mark.parametrize(
    ("after", "status", "code"),
    [
        ("", 400, "invalid_request"),
        ("7", 400, "invalid_request"),
        ("abc-", 400, "invalid_request"),
        ("abc-" + "9" * 19, 400, "invalid_request"),
        ("abc-1;drop", 400, "invalid_request"),
        ("0123456789abcdef-1", 409, "other_sale"),
        ("EPOCH-1", 409, "cursor_ahead"),
    ],
)
def test_wrong_cursors(app, feed, after, status, code):
    with app.app_context():
        after = after.replace("EPOCH", reading.ends().epoch)
    answer = feed(after)
    assert (answer.status_code, answer.json["code"]) == (status, code)


@pytest.mark.parametrize(
    "query",
    [
        {"type": "order.held"},
        {"limit": 0},
        {"limit": 1001},
        {"limit": "x"},
        {"wait": 21},
        {"wait": -1},
    ],
)
def test_wrong_queries(feed, query):
    answer = feed(**query)
    assert (answer.status_code, answer.json["field"]) == (400, next(iter(query)))


def test_without_a_token(client):
    assert client.get("/orders/events").status_code == 401


def test_a_reset_begins_another_feed_and_a_rebuild_does_not(app, buy, drain, number, feed):
    buy(1)
    drain()
    number()
    cursor = feed().json["next"]
    with app.app_context():
        recovery.rebuild(CLI)
    assert feed(cursor).json == {"events": [], "next": cursor}
    buy(2)
    drain()
    number()
    assert [event["order"]["userId"] for event in feed(cursor).json["events"]] == ["2"]
    with app.app_context():
        recovery.reset(CLI)
    assert feed(cursor).json["code"] == "other_sale"
    assert feed().json["events"] == []


def test_a_rebuild_tells_of_what_it_rescued(app, buy, number, feed):
    buy(1)
    with app.app_context():
        recovery.rebuild(CLI)
    number()
    assert [event["type"] for event in follow(feed)] == ["order.confirmed"]


def test_old_days_are_dropped_whole(app, buy, drain, number, feed):
    old = date(2026, 1, 1)
    buy(1)
    drain()
    number()
    oldest = feed().json["next"]
    with app.app_context():
        with numbering.raw_connection(db.engine) as connection, connection.cursor() as cursor:
            numbering._make(connection, cursor, old)
            cursor.execute("UPDATE events SET day = %s", (old,))
            connection.commit()
        buy(2)
        drain()
        number()
        kept = feed(oldest).json["next"]
        # The worker's step has done it, by the way.
        assert not db.session.scalar(text("SELECT to_regclass('events_20260101')"))
        assert numbering.keep_partitions() == []
    first, number_of_it = oldest.split("-")
    answer = feed(f"{first}-{int(number_of_it) - 1}")
    assert (answer.status_code, answer.json["code"]) == (410, "cursor_expired")
    # Who has read up to there has missed nothing.
    assert [event["order"]["userId"] for event in feed(oldest).json["events"]] == ["2"]
    assert feed(kept).json["events"] == []
    assert [event["order"]["userId"] for event in feed().json["events"]] == ["2"]


def test_a_day_without_a_partition_gets_one(app, buy, drain, feed):
    """Nobody was there for days, or PostgreSQL's clock was set: it is noticed by the failure."""
    numberer = numbering.Numberer()
    with app.app_context():
        numberer.run_once()
        today = db.session.scalar(text("SELECT now()")).date()
        with numbering.raw_connection(db.engine) as connection, connection.cursor() as cursor:
            cursor.execute(f"DROP TABLE events_{today:%Y%m%d}")
            connection.commit()
        buy(1)
        drain()
        with pytest.raises(errors.CheckViolation):
            numberer.run_once()
        numberer.run_once()
    assert [event["order"]["userId"] for event in follow(feed)] == ["1"]


def test_partitions_are_there_before_their_days(app):
    with app.app_context():
        numbering.keep_partitions()
        numbering.keep_partitions()
        names = db.session.scalars(text("SELECT inhrelid::regclass::text FROM pg_inherits"
                                        " WHERE inhparent = 'events'::regclass")).all()  # fmt: skip
        today = db.session.scalar(text("SELECT now()")).date()
    for ahead in range(3):
        assert f"events_{today + timedelta(ahead):%Y%m%d}" in names


def test_dead_letters_are_told_and_what_becomes_of_them(app, client, buy, drain, number, feed):
    buy(1, key="one")
    buy(2, key="two")
    drain()
    with app.app_context():
        # The same keys once more, which Redis has forgotten: PostgreSQL refuses them.
        for user in (1, 2):
            stock.client.xadd(
                "sale:{0}:outbox",
                {"order": db.session.scalar(text("SELECT 'x'"))},
                id=f"{900 + user}-0",
            )
        drain_batch("test", "test")
        letters = deadletters.list_letters()
        assert len(letters) == 2
    number()
    # Those are no orders: nothing can be told of them.
    assert {event["type"] for event in follow(feed)} == {"order.confirmed"}


@pytest.mark.parametrize(("seconds", "after"), [(None, "confirmed"), (300, "held")])
def test_an_order_that_can_not_be_stored_is_told_as_failed(
    app, client, admin_headers, buy, number, feed, seconds, after
):
    client.patch("/products/1", json={"holdSeconds": seconds}, headers=admin_headers)
    buy(1)
    with app.app_context():
        db.session.execute(text("ALTER TABLE orders ADD CONSTRAINT none CHECK (id <> 1)"))
        db.session.commit()
        try:
            drain_batch("test", "test")
        finally:
            db.session.execute(text("ALTER TABLE orders DROP CONSTRAINT none"))
            db.session.commit()
        number()
        events = follow(feed)
        assert [event["type"] for event in events] == ["order.failed"]
        assert events[0]["order"]["status"] == "FAILED"
        (letter,) = deadletters.list_letters()
        deadletters.replay([letter.id], "mended", CLI)
    number()
    told = follow(feed)
    assert [event["type"] for event in told] == ["order.failed", f"order.{after}"]
    assert told[1]["order"]["status"] == after.upper()


def test_products_are_told_when_sold_out_and_restocked(app, buy, drain, number, feed):
    with app.app_context():
        observer = Observer()
        assert observer.run_once() == []
        stock.client.hset("sale:{0}:product:1", "free", 1)
        buy(1)
        assert observer.run_once() == [1]
        assert observer.run_once() == []
        # Another worker, which has not looked before.
        assert Observer().run_once() == []
        movements.restock(1, 5, None, CLI)
        assert observer.run_once() == []
        assert Observer().run_once() == []
        stock.client.hset("sale:{0}:product:1", "free", 0)
        assert observer.run_once() == [1]
    number()
    told = [event for event in follow(feed) if "product" in event]
    types = [event["type"] for event in told]
    assert types == ["product.sold_out", "product.restocked", "product.sold_out"]
    assert told[0]["observed"] is True
    assert told[1]["units"] == 5
    assert told[1]["product"] == {"id": 1, "name": "Flash-sale item", "freeUnits": 5}


def test_a_poll_waits_on_the_loop_and_ends_with_the_first_event(server):
    """More wait than there are threads for pages, and pages are answered meanwhile."""
    bearer = {"Authorization": f"Bearer {server.api_token}"}
    start = json.loads(server.call("GET", "/orders/events?limit=1000", **bearer)[2])["next"]
    answers, threads = [], []

    def ask(seconds: int) -> None:
        path = f"/orders/events?after={start}&wait={seconds}"
        answers.append(server.call("GET", path, **bearer))

    threads = [threading.Thread(target=ask, args=(20,)) for _ in range(30)]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    assert server.call("GET", "/products")[3] < patience(2)
    assert not answers
    bought = server.call("POST", "/purchase", {"userId": 4711, "productId": 1, "quantity": 1})
    assert bought[0] == 200
    for thread in threads:
        thread.join(15)
    assert len(answers) == 30
    for status, _, body, seconds in answers:
        assert status == 200
        assert seconds < 15
        assert json.loads(body)["events"][0]["order"]["userId"] == "4711"


def test_a_poll_in_vain_ends_in_time(server):
    bearer = {"Authorization": f"Bearer {server.api_token}"}

    def quiet() -> str | None:
        answer = json.loads(server.call("GET", "/orders/events?limit=1000", **bearer)[2])
        return None if answer["events"][1000:] else answer["next"]

    after = wait_until(quiet, what="the end of the feed")
    status, _, body, seconds = server.call("GET", f"/orders/events?after={after}&wait=1", **bearer)
    assert (status, json.loads(body)) == (200, {"events": [], "next": after})
    assert 0.9 < seconds < patience(5)
