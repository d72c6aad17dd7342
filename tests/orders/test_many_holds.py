"""Holds by the hundred: what is decided together costs a handful of statements, however many."""

import re
import threading
import time
from contextlib import contextmanager

import pytest
from crowd import at_once
from sqlalchemy import event, text

from app import planned
from app.audit import CLI
from app.books import ledger
from app.config import NO_LIMIT
from app.extensions import db, stock
from app.orders import expiry, holds, intents, states
from app.orders.drain import drain_batch
from app.problems import KeyMismatch, Unavailable
from app.products import catalogue
from app.stock.keys import KEYS


@pytest.fixture
def held(app, drain):
    """Have so many orders held, by as many users; stored unless they are to wait."""

    def hold(orders: int, stored: bool = True) -> list[int]:
        with app.app_context():
            catalogue.change(1, {"hold_seconds": 60}, CLI)
            claims = [stock.claim(n, 1, 1, f"cart-{n}", f"10.0.0.{n}") for n in range(orders)]
        if stored:
            drain()
        return [claim.detail for claim in claims]

    return hold


def end_all() -> None:
    db.session.execute(text("UPDATE orders SET held_until = now() - interval '10 s'"))
    db.session.commit()


def wishes(orders, key: str = "k") -> list[holds.Confirm]:
    return [holds.Confirm(n, CLI, f"pay-{n}", f"{key}-{n}") for n in orders]


def statuses() -> set[str]:
    found = set(db.session.scalars(text("SELECT status FROM orders")))
    db.session.rollback()
    return found


@contextmanager
def counted():
    """Yield the SQL statements of the block, but for those that are prepared once for a session."""
    seen = []

    def note(connection, cursor, statement, *_):
        if not statement.startswith("PREPARE"):
            seen.append(statement)

    event.listen(db.engine, "before_cursor_execute", note)
    try:
        yield seen
    finally:
        event.remove(db.engine, "before_cursor_execute", note)


def confirm_stored(orders):
    assert all(isinstance(done, holds.Done) for done in holds.confirm_together(wishes(orders)))


def confirm_early(orders):
    assert all(done.waits for done in holds.confirm_together(wishes(orders)))


def end(orders):
    assert expiry.expire(len(orders)) == len(orders)


@pytest.mark.parametrize(
    ("act", "stored", "most"),
    [(confirm_stored, True, 2), (confirm_early, False, 7), (end, True, 8)],
)
def test_fifty_cost_as_many_statements_as_two(app, held, act, stored, most):
    with app.app_context():
        ids = held(52, stored)
        if act is end:
            end_all()
        counts = []
        for orders in (ids[:2], ids[2:]):
            db.session.execute(text("SELECT 1"))
            with counted() as seen:
                act(orders)
            counts.append(len(seen))
        assert counts[0] == counts[1] <= most


def test_the_product_s_row_of_totals_is_locked_by_the_last_statement(app, held):
    """Whoever changes an order waits for it: so it is taken when there is nothing else to do."""
    with app.app_context():
        ids = held(3)
        with counted() as seen:
            confirm_stored(ids)
        # Prepared, perhaps on another connection of the pool.
        _, run = planned._prepared(states.CONFIRM.text, states.BY_ID)
        (name,) = re.findall(r"EXECUTE (\w+)", run.text)
        assert name in seen[-1], seen
        assert not any(name in statement or "UPDATE" in statement for statement in seen[:-1])


def test_more_than_a_script_takes_end_in_several_movements(app, held, monkeypatch):
    """And an order's own movement is found, whichever of them it is."""
    end = states.EXPIRE.text
    assert f"/ {states.ENDED_TOGETHER} " in end
    monkeypatch.setattr(states, "EXPIRE", text(end.replace(f"/ {states.ENDED_TOGETHER} ", "/ 20 ")))
    monkeypatch.setattr(expiry, "BATCH_ORDERS", 45)
    with app.app_context():
        ids = held(52)
        end_all()
        assert expiry.Expiry().step() is False
        assert statuses() == {"EXPIRED"}
        sizes = text("SELECT cardinality(order_ids) FROM stock_movements WHERE order_ids <> '{}'")
        assert sorted(db.session.scalars(sizes)) == [5, 7, 20, 20]
        assert ledger.check(rows=True).ok
        for order in (ids[0], ids[44], ids[-1]):
            assert order in states.movement_of(states.lock(order)).order_ids
            db.session.rollback()
        assert stock.view([1]).products[1]["free"] == 100


def test_in_a_sale_of_several_shards_each_shopper_s_gets_the_units(make_app):
    """A movement's orders are told to their own shards, which may be some of them."""
    app = make_app(shards=6, purchase_user_limit=NO_LIMIT)
    with app.app_context():
        catalogue.change(1, {"hold_seconds": 60}, CLI)
        for user in (1, 2, 3, "anna"):
            stock.claim(user, 1, 2, f"cart-{user}", "10.0.0.1")
        drain_batch("test", "test")
        end_all()
        assert expiry.expire(3) == 3
        stock.claim(4, 1, 1, None, "10.0.0.1")
        drain_batch("test", "test")
        end_all()
        assert expiry.expire(10) == 2
        assert stock.view([1]).products[1]["free"] == 100
        parts = db.session.scalars(
            text("SELECT parts FROM stock_movements WHERE order_ids <> '{}'")
        )
        assert [sum(each) for each in parts] == [6, 3]
        db.session.rollback()
        assert ledger.check(rows=True).ok


def test_what_is_bought_is_counted_down_once_for_each_order(app, client, drain, buy, admin_headers):
    """Of one user two orders end together, and a third one is paid."""
    body = {"holdSeconds": 300}
    assert client.patch("/products/1", json=body, headers=admin_headers).status_code == 200
    for key in ("a", "b", "c"):
        buy(7, quantity=2, key=key)
    buy("anna", key="a")
    drain()
    with app.app_context():
        holds.confirm(holds.Confirm(2, CLI))
        end_all()
        assert expiry.expire(10) == 3
        assert ledger.check(rows=True).ok
        bucket, field = KEYS.bought(1, 7)
        assert stock.client.hgetall(bucket) == {field: "2"}
        assert not stock.client.exists(KEYS.bought(1, "anna")[0])


def test_early_confirmations_are_accepted_together_and_done_together(app, held, drain):
    with app.app_context():
        ids = held(30, stored=False)
        told = holds.confirm_together(wishes(ids))
        assert all(done.waits and done.order["confirming"] for done in told)
        again = holds.confirm(wishes(ids)[3])
        assert (again.order, again.waits, again.replayed) == (told[3].order, True, True)
        with pytest.raises(KeyMismatch):
            holds.confirm(holds.Confirm(ids[3], CLI, "other", f"k-{ids[3]}"))
        drain()
        end_all()
        assert expiry.expire(100) == 0
        assert intents.apply_open() == 30
        assert (statuses(), intents.apply_open()) == ({"CONFIRMED"}, 0)
        told = text("SELECT count(*), count(DISTINCT order_id) FROM new_events WHERE sequence = 1")
        assert tuple(db.session.execute(told).one()) == (30, 30)
        paid = text("SELECT count(*) FROM orders WHERE payment = 'pay-' || id AND acts = 1")
        assert db.session.scalar(paid) == 30
        db.session.rollback()
        assert ledger.check(rows=True).ok


def test_one_that_is_stored_while_it_is_accepted_is_looked_at_again(app, held, drain, monkeypatch):
    """Its hold may have ended in between: nobody is told that it is accepted then."""
    with app.app_context():
        ids = held(3, stored=False)
        accept = intents.accept_confirms

        def late(wanted):
            accepted = accept(wanted)
            at_once(lambda act: act(), [drain])
            return accepted

        monkeypatch.setattr(intents, "accept_confirms", late)
        assert holds.confirm_together(wishes(ids)) == [None] * 3
        monkeypatch.undo()
        assert [holds.confirm(wish).order["status"] for wish in wishes(ids)] == ["CONFIRMED"] * 3
        assert statuses() == {"CONFIRMED"}


@pytest.mark.parametrize("stored", [True, False])
def test_the_same_confirmation_twice_never_waits_for_itself(app, held, monkeypatch, stored):
    """One is about to take the key in a turn; the other one is decided alone."""
    with app.app_context():
        (wish,) = wishes(held(1, stored=stored))
    take = (holds.states, "confirm_all") if stored else (holds.idempotency, "put_all")
    take_now, done, told = getattr(*take), threading.Event(), []
    reached = threading.Event()

    def late(*arguments):
        if arguments[-1]:
            reached.set()
            blocked = text("SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted)")
            while not done.is_set():
                with db.engine.connect() as other:
                    if other.scalar(blocked):
                        break
        return take_now(*arguments)

    def together():
        with app.app_context():
            told.append(holds.confirm(wish))

    def alone():
        assert reached.wait(30)
        try:
            with app.app_context():
                told.append(holds._confirm_alone(wish))
        finally:
            done.set()

    monkeypatch.setattr(*take, late)
    at_once(lambda act: act(), [together, alone])
    assert [one.order for one in told] == [told[0].order] * 2
    assert sorted(one.replayed for one in told) == [False, True]


def test_where_redis_is_away_early_confirmations_are_answered_alone(app, held, monkeypatch):
    with app.app_context():
        (early,) = held(1, stored=False)

        def away(_):
            raise Unavailable("away")

        monkeypatch.setattr(stock, "waiting_order", away)
        assert holds.confirm_together(wishes([early])) == [None]
        with pytest.raises(Unavailable):
            holds.confirm(wishes([early])[0])
        assert db.session.scalar(text("SELECT count(*) FROM order_intents")) == 0


def test_confirmations_drains_and_ends_at_once(app, held, drain):
    """Each order is confirmed exactly once, whoever of them comes first."""
    with app.app_context():
        ids = held(100, stored=False)
    told = {}

    def pay(part):
        with app.app_context():
            for wish in wishes(ids[part::4]):
                told[wish.order_id] = holds.confirm(wish)

    def sweep(_):
        with app.app_context():
            for _ in range(20):
                drain()
                intents.apply_open()

    at_once(lambda act: act[0](act[1]), [(pay, n) for n in range(4)] + [(sweep, 0), (sweep, 1)])
    with app.app_context():
        drain()
        intents.apply_open()
        assert statuses() == {"CONFIRMED"}
        assert sorted(told) == sorted(ids)
        assert ledger.check(rows=True).ok


def test_a_row_that_somebody_holds_is_no_server_that_is_away(app, held, client, admin_headers):
    """Who waits for it in vain is answered 503; nobody else is."""
    ids = held(2)
    with app.app_context():
        db.session.execute(text("SELECT 1 FROM product_totals FOR UPDATE"))
        stopped = threading.Event()

        def look():
            """Others are answered meanwhile."""
            mine, told = app.test_client(), set()
            while not stopped.is_set():
                path = f"/orders/{ids[1]}"
                told.add(mine.get(path, headers=admin_headers).status_code)
                time.sleep(0.01)
            return told

        def confirm():
            answer = client.post(f"/orders/{ids[0]}/confirm", headers=admin_headers)
            after = app.test_client().get(f"/orders/{ids[1]}", headers=admin_headers)
            stopped.set()
            return answer.status_code, answer.headers["Retry-After"], after.status_code

        assert at_once(lambda act: act(), [look, confirm]) == [{200}, (503, "1", 200)]
        db.session.rollback()
        assert statuses() == {"HELD"}
