"""Migrations and the rules that stand in the schema itself."""

import threading

import flask_migrate
import pytest
from alembic.script import ScriptDirectory
from older import database_of
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from app.extensions import db
from app.products.movements import totals
from app.watch.health import newest_migration


def test_one_head_and_models_match(app):
    with app.app_context():
        script = ScriptDirectory(app.extensions["migrate"].directory)
        assert script.get_heads() == [newest_migration()]
        flask_migrate.check()


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE audit_log SET actor = 'nobody'",
        "DELETE FROM audit_log",
        "TRUNCATE audit_log",
        "INSERT INTO orders (id, user_id, product_id, quantity, unit_price_cents, currency,"
        " claimed_at) VALUES (1, 0, 1, 1, 1, 'USD', now())",
        "INSERT INTO orders (id, user_id, product_id, quantity, unit_price_cents, currency,"
        " claimed_at) VALUES (1, 1, 2, 1, 1, 'USD', now())",
        "INSERT INTO orders (id, user_id, product_id, quantity, unit_price_cents, currency,"
        " claimed_at) VALUES (1, 1, 1, 0, 1, 'USD', now())",
        "INSERT INTO orders (id, user_id, product_id, quantity, unit_price_cents, currency,"
        " claimed_at, status) VALUES (1, 1, 1, 1, 1, 'USD', now(), 'CANCELLED')",
        "INSERT INTO stock_movements (product_id, kind, units, actor)"
        " VALUES (1, 'restock', -1, 'x')",
        "INSERT INTO stock_movements (product_id, kind, units, actor) VALUES (1, 'gift', 1, 'x')",
        "UPDATE products SET currency = 'usd'",
        "UPDATE products SET opens_at = now(), closes_at = now() - interval '1 day'",
        "INSERT INTO sale (id, generation) VALUES (2, 'x')",
        "INSERT INTO staff (email, password_hash, role, session_key)"
        " VALUES ('A@B', 'x', 'admin', 'x')",
    ],
)
def test_the_schema_refuses(app, statement):
    with app.app_context(), pytest.raises(DBAPIError):
        db.session.execute(text(statement))


def test_totals_follow_every_change(app):
    insert = (
        "INSERT INTO orders (id, user_id, product_id, quantity, unit_price_cents, currency,"
        " claimed_at) SELECT n, n, 1, 2, 1, 'USD', now() FROM generate_series(1, 10) n"
    )
    cancel = "UPDATE orders SET status = 'CANCELLED', cancelled_at = now() WHERE id <= 3"
    with app.app_context():
        for statement in (insert, cancel, "DELETE FROM orders WHERE id in (1, 10)"):
            db.session.execute(text(statement))
        row = totals()[1]
        assert (row.confirmed_orders, row.confirmed_units) == (6, 12)
        assert (row.cancelled_orders, row.cancelled_units) == (2, 4)
        assert row.moved_units == 100
        db.session.rollback()


@pytest.fixture
def older(built_app, settings):
    """An app on a database of its own that stands before texts could name users."""
    with database_of(settings, "0006_pages") as app:
        db.session.execute(text(OLD_ORDER), {"id": 1})
        db.session.commit()
        yield app


OLD_ORDER = (
    "INSERT INTO orders (id, user_id, product_id, quantity, unit_price_cents, currency,"
    " claimed_at, idempotency_key) VALUES (:id, 7, 1, 1, 1, 'USD', now(), 'key-' || :id)"
)
TEXT_ORDER = OLD_ORDER.replace("user_id", "user_name").replace(" 7,", " 'ann',")


def test_texts_come_to_a_system_that_sells(older, caplog):
    """The migration lets others go first, can be repeated, and rewrites no row."""
    where = "SELECT ctid::text, xmin::text FROM orders WHERE id = 1"
    row = db.session.execute(text(where)).one()
    db.session.commit()
    reader = db.engine.connect()
    reader.execute(text("SELECT FROM orders"))
    done = threading.Timer(2.0, reader.rollback)
    done.start()
    with caplog.at_level("WARNING", "alembic.runtime.migration"):
        flask_migrate.upgrade(revision="0007_user_names")
    done.join()
    reader.close()
    assert "orders is in use, try 1" in caplog.text
    assert db.session.execute(text(where)).one() == row
    # An older worker goes on; and a migration that was killed on its way begins again.
    db.session.execute(text(OLD_ORDER), {"id": 2})
    db.session.execute(
        text(
            "UPDATE pg_index SET indisvalid = false"
            " WHERE indexrelid = 'uq_orders_user_name_idempotency_key'::regclass"
        )
    )
    db.session.commit()
    flask_migrate.stamp(revision="0006_pages")
    flask_migrate.upgrade(revision="0007_user_names")
    valid = "SELECT bool_and(indisvalid) FROM pg_index JOIN pg_class ON oid = indexrelid"
    assert db.session.scalar(text(f"{valid} WHERE relname LIKE '%user_name%'"))
    db.session.execute(text(TEXT_ORDER), {"id": 3})
    db.session.commit()
    with pytest.raises(DBAPIError, match="users with text ids"):
        flask_migrate.downgrade(revision="0006_pages")
    db.session.execute(text("DELETE FROM orders WHERE user_name = 'ann'"))
    db.session.commit()
    flask_migrate.downgrade(revision="0006_pages")
    db.session.execute(text(OLD_ORDER), {"id": 4})
    db.session.rollback()


def test_products_of_before_are_listed_and_keep_their_names(older):
    """The migration rewrites no row of the orders, and old processes go on beside it."""
    flask_migrate.upgrade(revision="0007_user_names")
    renamed = (
        "INSERT INTO audit_log (actor, action, target, before, after) VALUES"
        " ('staff a@b', 'product.change', 'product 1', :before, :after)"
    )
    names = {"before": '{"name": "Candle"}', "after": '{"name": "Lamp"}'}
    db.session.execute(text(renamed), names)
    row = "SELECT ctid::text, xmin::text FROM orders WHERE id = 1"
    before = db.session.execute(text(row)).one()
    db.session.commit()
    flask_migrate.upgrade(revision="0010_shop")
    # One that was killed on its way begins again.
    flask_migrate.stamp(revision="0009_bulk_cancels")
    flask_migrate.upgrade(revision="0010_shop")
    assert db.session.execute(text(row)).one() == before
    columns = "SELECT sku, visibility, archived, minor_units FROM products WHERE id = :id"
    assert db.session.execute(text(columns), {"id": 1}).one() == (None, "listed", False, None)
    # What an old process does: it creates, and it renames.
    old = "INSERT INTO products (name, price_cents, currency) VALUES ('Fan', 150000, 'JPY')"
    db.session.execute(text(old))
    db.session.execute(text("UPDATE products SET name = 'Fans' WHERE id = 2"))
    db.session.execute(text("UPDATE products SET price_cents = 2 WHERE id = 2"))
    assert db.session.execute(text(columns), {"id": 2}).one() == (None, "listed", False, None)
    kept = "SELECT product_id, name FROM product_names ORDER BY product_id"
    assert db.session.execute(text(kept)).all() == [(1, "Candle"), (2, "Fan")]
    db.session.commit()
    flask_migrate.downgrade(revision="0007_user_names")
    db.session.execute(text("UPDATE products SET name = 'Lamps' WHERE id = 1"))
    db.session.commit()


def test_holds_come_to_a_system_that_sells(older):
    """No row is rewritten, a killed migration begins again, and old processes go on beside it."""
    flask_migrate.upgrade(revision="0012_webhooks")
    rows = "SELECT ctid::text, xmin::text FROM orders WHERE id = 1"
    before = db.session.execute(text(rows)).one()
    db.session.commit()
    flask_migrate.upgrade(revision="0013_holds")
    db.session.execute(
        text(
            "UPDATE pg_index SET indisvalid = false"
            " WHERE indexrelid = 'uq_stock_movements_open_reclaim'::regclass"
        )
    )
    db.session.commit()
    flask_migrate.stamp(revision="0012_webhooks")
    flask_migrate.upgrade(revision="0013_holds")
    valid = "SELECT bool_and(indisvalid) FROM pg_index JOIN pg_class ON oid = indexrelid"
    assert db.session.scalar(text(f"{valid} WHERE relname LIKE '%stock_movements%'"))
    assert db.session.execute(text(rows)).one() == before
    # What a process of 0.1.0 stores, and gives back, is as it was.
    db.session.execute(text(OLD_ORDER), {"id": 2})
    db.session.execute(
        text("UPDATE orders SET status = 'CANCELLED', cancelled_at = now() WHERE id = 2")
    )
    db.session.execute(
        text(
            "INSERT INTO stock_movements (product_id, kind, units, actor, order_id)"
            " VALUES (1, 'return', 1, 'x', 2)"
        )
    )
    found = "SELECT status, held_until, extended_from, returned_units FROM orders ORDER BY id"
    assert db.session.execute(text(found)).all() == [
        ("CONFIRMED", None, None, 0),
        ("CANCELLED", None, None, 1),
    ]
    db.session.commit()
    with pytest.raises(DBAPIError, match="ck_products_hold_seconds"):
        db.session.execute(text("UPDATE products SET hold_seconds = 29"))
    db.session.rollback()
    flask_migrate.downgrade(revision="0012_webhooks")
    db.session.execute(text(OLD_ORDER), {"id": 3})
    db.session.rollback()


def test_events_of_many_orders_come_to_a_system_that_sells(older):
    """Events that wait or are numbered stay as they are, and old processes go on beside it."""
    flask_migrate.upgrade(revision="0014_shards")
    old = text("INSERT INTO new_events (type, body) VALUES ('order.held', '{}')")
    db.session.execute(old)
    rows = "SELECT ctid::text, xmin::text FROM new_events ORDER BY id"
    before = db.session.execute(text(rows)).all()
    db.session.commit()
    flask_migrate.upgrade(revision="0015_ended_together")
    flask_migrate.stamp(revision="0014_shards")
    flask_migrate.upgrade(revision="0015_ended_together")
    assert db.session.execute(text(rows)).all() == before
    db.session.execute(old)
    found = "SELECT count, movement_id FROM new_events"
    assert db.session.execute(text(found)).all() == [(1, None)] * 2
    together = "INSERT INTO new_events (type, count, movement_id) VALUES ('order.expired', 9, 1)"
    db.session.execute(text(together))
    db.session.commit()
    with pytest.raises(DBAPIError, match="ended together"):
        flask_migrate.downgrade(revision="0014_shards")
    db.session.execute(text("DELETE FROM new_events WHERE movement_id IS NOT NULL"))
    db.session.commit()
    flask_migrate.downgrade(revision="0014_shards")
    db.session.execute(old)
    db.session.rollback()
