"""Order states: every status has totals, parts come back once, and 0.1.0 goes on beside them."""

import threading

import flask_migrate
import pytest
from older import database_of
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from app.audit import CLI
from app.books import ledger, recovery
from app.extensions import db, stock
from app.models import ENDED_STATUSES, STANDING_STATUSES, Order
from app.orders import states
from app.orders.drain import drain_batch
from app.problems import Conflict
from app.products.movements import finish_pending, totals

INSERT = (
    "INSERT INTO orders (id, user_id, product_id, quantity, unit_price_cents, currency,"
    " claimed_at) SELECT n, n, 1, 3, 1, 'USD', now() FROM generate_series(1, 10) n"
)
STATES = {
    "CONFIRMED": "status = 'CONFIRMED', returned_units = 1",
    "HELD": "status = 'HELD', held_until = now()",
} | {
    status: f"status = '{status}', returned_units = quantity, acts = 1, cancelled_at = now()"
    for status in ENDED_STATUSES
}


@pytest.mark.parametrize("status", [*STANDING_STATUSES, *ENDED_STATUSES])
def test_every_status_has_totals_that_a_rebuild_knows(app, status):
    """The ledger's figures of rows and sums agree, and nothing is sold twice afterwards."""
    with app.app_context():
        db.session.execute(text(INSERT))
        db.session.execute(text(f"UPDATE orders SET {STATES[status]} WHERE id <= 4"))
        db.session.execute(
            text(
                "INSERT INTO stock_movements (product_id, kind, units, actor, user_id, order_id,"
                " applied_at) SELECT product_id, 'return', returned_units, 'x', user_id, id, now()"
                " FROM orders WHERE returned_units > 0"
            )
        )
        db.session.commit()
        row = totals()[1]
        of_status = {name: getattr(row, f"{name.lower()}_orders") for name in STATES}
        expected = dict.fromkeys(STATES, 0) | {"CONFIRMED": 6}
        expected[status] += 4
        assert of_status == expected
        assert (row.stored_orders, row.stored_units) == (10, 30)
        recovery.rebuild(CLI)
        assert ledger.check(rows=True).ok
        standing = db.session.scalar(text("SELECT sum(quantity - returned_units) FROM orders"))
        assert stock.view([1]).products[1]["free"] == 100 - standing
        assert row.confirmed_units + row.held_units == standing


def test_a_status_without_totals_is_refused(app):
    insert = INSERT.replace("claimed_at)", "claimed_at, status)").replace("now()", "now(), 'LOST'")
    with app.app_context():
        # Whatever a later schema lets in.
        db.session.execute(text("ALTER TABLE orders DROP CONSTRAINT ck_orders_state"))
        with pytest.raises(DBAPIError, match="no totals of orders that are LOST"):
            db.session.execute(text(insert))


@pytest.mark.parametrize(
    "change",
    [
        "returned_units = 4",
        "returned_units = -1",
        "returned_units = 3",
        "status = 'CANCELLED', acts = 1, cancelled_at = now(), returned_units = 2",
        "status = 'HELD'",
        "status = 'EXPIRED', returned_units = 3",
        "payment = ''",
    ],
)
def test_the_schema_refuses_a_state(app, change):
    with app.app_context():
        db.session.execute(text(INSERT))
        with pytest.raises(DBAPIError, match="violates check constraint"):
            db.session.execute(text(f"UPDATE orders SET {change} WHERE id = 1"))


def buy(app, quantity=3, user=7, key=None):
    with app.app_context():
        assert stock.claim(user, 1, quantity, key, "").outcome == b"accepted"
        drain_batch("", "test")


def give_back(units, status="CANCELLED"):
    returned = states.give_back(states.lock(1), units, status, "test", CLI)
    db.session.commit()
    return returned


def test_parts_come_back_until_nothing_is_left(app):
    buy(app)
    with app.app_context():
        assert give_back(2).units == 2
        order = db.session.get_one(Order, 1)
        assert (order.status, order.returned_units, order.acts) == ("CONFIRMED", 2, 1)
        assert order.cancelled_at is None
        for units in (0, -1, 2, 3):
            with pytest.raises(Conflict, match="1 of this order"):
                give_back(units)
            db.session.rollback()
        with pytest.raises(Conflict, match="confirmed"):
            give_back(1, "EXPIRED")
        db.session.rollback()
        give_back(1)
        order = db.session.get_one(Order, 1)
        assert (order.status, order.returned_units, order.acts) == ("CANCELLED", 3, 2)
        assert (order.cancelled_by, order.cancel_reason) == (CLI.name, "test")
        with pytest.raises(Conflict) as refused:
            give_back(1)
        assert refused.value.code == "already_cancelled"
        db.session.rollback()
        assert finish_pending() == 2
        assert finish_pending() == 0
        assert stock.view([1]).products[1]["free"] == 100
        assert ledger.check(rows=True).ok


def test_two_parts_at_once_are_each_decided_on_what_is_left(app):
    buy(app)
    outcomes = []

    def part():
        with app.app_context():
            try:
                outcomes.append(give_back(2).units)
            except Conflict as refused:
                outcomes.append(refused.code)

    threads = [threading.Thread(target=part) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes, key=str) == [2, *["too_many_units"] * 3]


def test_the_key_of_a_partly_cancelled_order_still_answers_as_before(app):
    buy(app, key="k")
    with app.app_context():
        give_back(1)
        finish_pending()
        assert stock.claim(7, 1, 3, "k", "").outcome == b"replayed"
        recovery.rebuild(CLI)
        assert stock.claim(7, 1, 3, "k", "").outcome == b"replayed"
        give_back(2)
        finish_pending()
        assert stock.claim(7, 1, 3, "k", "").outcome == b"order_ended"


def test_a_rebuild_between_a_return_and_its_units_gives_the_cap_back_once(app):
    buy(app)
    with app.app_context():
        db.session.execute(text("UPDATE products SET per_user_limit = 3, version = version + 1"))
        db.session.commit()
        give_back(1)
        recovery.rebuild(CLI)  # which finishes what is pending
        assert stock.claim(7, 1, 2, None, "").outcome == b"capped"
        assert stock.claim(7, 1, 1, None, "").outcome == b"accepted"
        assert stock.claim(7, 1, 1, None, "").outcome == b"capped"


@pytest.fixture
def older(built_app, settings):
    """An app on a database of its own that stands as it was before orders had parts."""
    with database_of(settings, "0007_user_names") as app:
        db.session.execute(text(INSERT))
        db.session.commit()
        yield app


def cancel_as_before(order_id):
    """What a process of 0.1.0 writes."""
    db.session.execute(
        text("UPDATE orders SET status = 'CANCELLED', cancelled_at = now() WHERE id = :id"),
        {"id": order_id},
    )
    db.session.execute(
        text(
            "INSERT INTO stock_movements (product_id, kind, units, actor, order_id)"
            " VALUES (1, 'return', 3, 'x', :id)"
        ),
        {"id": order_id},
    )
    db.session.commit()


def test_states_come_to_a_system_that_sells_and_cancels(older):
    cancel_as_before(2)
    stood = text("SELECT ctid::text, xmin::text FROM orders WHERE id = 1")
    row = db.session.execute(stood).one()
    db.session.commit()
    flask_migrate.upgrade(revision="0008_order_states")
    assert db.session.execute(stood).one() == row, "an order that stands is not rewritten"
    cancel_as_before(3)
    db.session.execute(text(INSERT.replace("1, 10", "11, 12")))
    db.session.commit()
    flask_migrate.stamp(revision="0007_user_names")
    flask_migrate.upgrade(revision="0008_order_states")
    query = text("SELECT id, returned_units, acts FROM orders WHERE id IN (1, 2, 3) ORDER BY id")
    assert db.session.execute(query).all() == [(1, 0, 0), (2, 3, 1), (3, 3, 1)]
    figures = text("SELECT confirmed_units, cancelled_units, stored_units FROM product_totals")
    assert db.session.execute(figures).one() == (30, 6, 36)
    with pytest.raises(DBAPIError, match="uq_stock_movements_order_id_act"):
        cancel_as_before(3)
    db.session.rollback()
    db.session.execute(text("UPDATE orders SET returned_units = 1, acts = 1 WHERE id = 1"))
    db.session.commit()
    with pytest.raises(DBAPIError, match="partly cancelled"):
        flask_migrate.downgrade(revision="0007_user_names")
    db.session.execute(text("UPDATE orders SET returned_units = 0 WHERE id = 1"))
    db.session.commit()
    flask_migrate.downgrade(revision="0007_user_names")
    cancel_as_before(4)
    assert db.session.execute(figures_before()).one() == (27, 9)


def figures_before():
    return text("SELECT confirmed_units, cancelled_units FROM product_totals")
