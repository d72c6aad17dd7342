"""Who waits for a lock of the sale holds no table meanwhile: a reset has it, and needs them."""

import threading
from contextlib import contextmanager

import pytest
from sqlalchemy import text
from sqlalchemy.exc import OperationalError
from waiting import wait_until

from app.audit import CLI
from app.books import ledger, recovery
from app.extensions import db, stock
from app.locks import DRAIN_LOCK, SALE_LOCK
from app.models import StockMovement
from app.products import movements

TABLES = "orders, dead_letters, batches, stock_movements, product_totals, products, sale"


@contextmanager
def thread_of(app, act):
    """Run `act` in a thread and a context of its own; yield the list of what it raised."""
    raised = []

    def run():
        with app.app_context():
            try:
                act()
            except Exception as error:
                raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    yield raised
    thread.join(30)
    assert not thread.is_alive()


def waits_for(cursor, locktype: str) -> list[int]:
    cursor.execute(
        "SELECT pid FROM pg_locks WHERE locktype = %s AND NOT granted"
        " AND coalesce(database, 0)"
        " IN (0, (SELECT oid FROM pg_database WHERE datname = current_database()))",
        [locktype],
    )
    return [pid for (pid,) in cursor.fetchall()]


def pending_movement(key=None) -> None:
    """Leave what a crash leaves between PostgreSQL and Redis."""
    db.session.add(
        StockMovement(product_id=1, kind="restock", units=5, actor="test", idempotency_key=key)
    )
    db.session.commit()


@pytest.mark.parametrize(
    ("lock", "act"),
    [
        (SALE_LOCK, movements.finish_pending),
        (SALE_LOCK, lambda: movements.restock(1, 5, None, CLI, "key")),
        (DRAIN_LOCK, ledger.check),
    ],
    ids=["sweeper", "repeated restock", "ledger"],
)
def test_a_reset_gets_the_tables(app, connect, monkeypatch, lock, act):
    # The ledger asks for a standstill at once, as it does when it finds no quiet moment.
    monkeypatch.setattr(ledger, "READINGS", 1)
    with app.app_context():
        pending_movement("key")
    reset, watch = connect(), connect()
    reset.execute("SELECT pg_advisory_xact_lock(%s)", [lock])
    with thread_of(app, act) as raised:
        wait_until(lambda: waits_for(watch, "advisory"), what="the lock to be asked for")
        reset.execute(f"LOCK TABLE {TABLES} IN ACCESS EXCLUSIVE MODE NOWAIT")
        reset.connection.rollback()
    assert raised == []
    with app.app_context():
        movements.finish_pending()
        assert ledger.check().ok
        assert stock.view([1]).products[1]["free"] == 105


def test_a_reset_that_postgres_refuses_leaves_redis_as_it_was(app, connect, buy):
    assert buy(1).status_code == 200
    reader, watch = connect(), connect()
    reader.execute("SELECT 1 FROM orders")
    before = stock.generation()
    with thread_of(app, lambda: recovery.reset(CLI)) as raised:
        wait_until(lambda: waits_for(watch, "relation"), what="the reset to wait for the tables")
        watch.execute("SELECT pg_cancel_backend(%s)", waits_for(watch, "relation"))
    assert isinstance(raised[0], OperationalError)
    assert stock.generation() == before
    assert stock.waiting() == 1
    assert buy(2).status_code == 200


MOVEMENTS = """
INSERT INTO stock_movements (product_id, kind, units, actor)
SELECT id, 'return', 1, 'test' FROM products ORDER BY id DESC
"""
LETTERS = """
INSERT INTO dead_letters (stream_id, payload, error, product_id, quantity)
SELECT 9000 + id || '-0', '', '', id, 1 FROM products ORDER BY id DESC
"""
MORE = "UPDATE dead_letters SET quantity = 2"
GONE = "DELETE FROM stock_movements"


@pytest.mark.parametrize("statements", [(MOVEMENTS, GONE), (LETTERS, MORE)])
def test_sums_are_locked_in_the_order_of_their_products(
    app, client, admin_headers, connect, statements
):
    """Whoever waits for the first one has no other: else two would wait for each other."""
    for number in range(7):
        body = {"name": f"P{number}", "priceCents": 1, "currency": "EUR", "stock": 1}
        assert client.post("/products", json=body, headers=admin_headers).status_code == 201
    first, watch = connect(), connect()
    for statement in statements:
        first.execute("SELECT FROM product_totals WHERE product_id = 1 FOR UPDATE")

        def change(statement=statement):
            db.session.execute(text(statement))
            db.session.commit()

        with thread_of(app, change) as raised:
            try:
                wait_until(lambda: waits_for(watch, "transactionid"), what="a sum to be waited for")
                watch.execute("SELECT FROM product_totals WHERE product_id > 1 FOR UPDATE NOWAIT")
            finally:
                watch.connection.rollback()
                first.connection.rollback()
        assert raised == []


def test_what_redis_has_by_now_locks_no_sums(app, connect):
    with app.app_context():
        pending_movement()
    connect().execute("SELECT FROM product_totals FOR UPDATE")
    other = connect()
    other.execute("SET lock_timeout = '1s'")
    other.execute("UPDATE stock_movements SET applied_at = now()")
    assert other.rowcount > 0
