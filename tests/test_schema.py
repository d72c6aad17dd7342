"""Migrations and the rules that stand in the schema itself."""

import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import flask_migrate
import pytest
from alembic.script import ScriptDirectory
from older import database_of
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from waiting import wait_until

from app.books import recovery
from app.config import ROOT
from app.extensions import db
from app.products.movements import totals
from app.watch.health import newest_migration


def test_one_head_and_models_match(app):
    with app.app_context():
        script = ScriptDirectory(app.extensions["migrate"].directory)
        assert script.get_heads() == [newest_migration()]
        flask_migrate.check()


def test_a_new_migration_gets_the_next_number_and_the_message_for_a_name(runner, tmp_path):
    shutil.copytree(ROOT / "migrations", tmp_path / "migrations")
    args = ["db", "--directory", str(tmp_path / "migrations"), "revision"]
    done = runner.invoke(args=[*args, "-m", "Products' notes, of every kind there may be"])
    assert done.exit_code == 0, done.output
    *before, made = sorted(path.stem for path in (tmp_path / "migrations" / "versions").glob("0*"))
    assert made == f"{len(before) + 1:04}_products_notes_of_every_kin"
    text = (tmp_path / "migrations" / "versions" / f"{made}.py").read_text()
    assert f'revision = "{made}"\ndown_revision = "{before[-1]}"' in text


def test_prepare_tells_of_models_without_a_migration(runner, monkeypatch):
    def lacking():
        db.session.execute(text("SELECT note FROM products"))

    monkeypatch.setattr(recovery, "database_is_empty", lacking)
    done = runner.invoke(args=["prepare"])
    assert done.exit_code == 1
    assert "Error: No migration makes what the models have: column" in done.output


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
def first(built_app, settings):
    """An app on a database of its own, as 0.1.0 left it."""
    with database_of(settings, "0002") as app:
        db.session.execute(text(OLD_ORDER), {"id": 1})
        db.session.commit()
        yield app


@pytest.fixture
def older(first):
    """The same, where it stands before texts could name users."""
    flask_migrate.upgrade(revision="0006_pages")
    return first


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


@contextmanager
def beside(app, work) -> Iterator[list[BaseException]]:
    """Run work in a thread; yield, and wait for it. It must not fail, unless errors are taken."""
    errors: list[BaseException] = []

    def run() -> None:
        with app.app_context():
            try:
                work()
            except BaseException as error:
                errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield errors
    finally:
        thread.join()
    if errors:
        raise errors[0]


@contextmanager
def ending(connection) -> Iterator[None]:
    """End its transaction, whatever happens: somebody may wait for it."""
    try:
        yield
    finally:
        connection.rollback()


def waiters_of(table: str) -> int:
    """Return how many wait for a lock of a table."""
    query = "SELECT count(*) FROM pg_locks WHERE relation = to_regclass(:name) AND NOT granted"
    with db.engine.connect() as connection:
        return connection.scalar(text(query), {"name": table})


def waits_for_a_row() -> bool:
    """Tell whether somebody waits for what another transaction has changed."""
    query = "SELECT EXISTS (SELECT FROM pg_locks WHERE locktype = 'transactionid' AND NOT granted)"
    with db.engine.connect() as connection:
        return bool(connection.scalar(text(query)))


def test_all_migrations_beside_a_transaction_that_stores(first):
    """Who stores orders while a system of 0.1.0 is updated is not ended by a deadlock."""
    letter = "INSERT INTO dead_letters (stream_id, payload, error) VALUES ('1', '', '')"
    entry = "INSERT INTO audit_log (actor, action, target) VALUES ('x', 'x', 'x')"
    with db.engine.connect() as drain:
        drain.execute(text(OLD_ORDER), {"id": 2})
        with beside(first, flask_migrate.upgrade), ending(drain):
            wait_until(lambda: waiters_of("products"), what="the migrations to wait for the drain")
            drain.execute(text(letter))
            drain.execute(text(entry))
            drain.commit()
    assert db.session.scalars(text("SELECT id FROM orders ORDER BY id")).all() == [1, 2]


def test_who_reads_is_not_ended_for_a_lock_of_two_tables(older):
    """The migration that needs orders and products lets go before PostgreSQL sees a deadlock."""
    flask_migrate.upgrade(revision="0015_ended_together")
    with db.engine.connect() as other, db.engine.connect() as page:
        other.execute(text("SELECT FROM orders"))
        page.execute(text("SELECT FROM products"))

        def read() -> None:
            # Behind the migration, which then has the orders and waits for the products.
            wait_until(lambda: waiters_of("orders"), what="the foreign key to be dropped")
            with ending(page):
                page.execute(text("SELECT FROM orders"))
            read_all.set()

        read_all = threading.Event()
        with beside(older, flask_migrate.upgrade), beside(older, read), ending(other):
            behind = lambda: waiters_of("orders") == 2 or read_all.is_set()  # noqa: E731
            wait_until(behind, what="the page to wait for the orders")
    flask_migrate.check()


def test_lighter_orders_come_to_a_system_that_sells(older):
    """No row is rewritten, a killed migration begins again, and nothing is refused less."""
    flask_migrate.upgrade(revision="0015_ended_together")
    rows = "SELECT ctid::text, xmin::text FROM orders WHERE id = 1"
    before = db.session.execute(text(rows)).one()
    db.session.commit()
    flask_migrate.upgrade(revision="0016_lighter_orders")
    new = "'uq_orders_idempotency_key_user_id'::regclass"
    db.session.execute(text(f"UPDATE pg_index SET indisvalid = false WHERE indexrelid = {new}"))
    db.session.commit()
    flask_migrate.stamp(revision="0015_ended_together")
    flask_migrate.upgrade(revision="0016_lighter_orders")
    assert db.session.scalar(text(f"SELECT indisvalid FROM pg_index WHERE indexrelid = {new}"))
    assert db.session.execute(text(rows)).one() == before
    db.session.execute(text(OLD_ORDER), {"id": 2})
    db.session.commit()
    refused(OLD_ORDER.replace("7, 1,", "7, 9,"), "fk_orders_product_id", id=3)
    refused(OLD_ORDER.replace("'key-' || :id", "'key-1'"), "user_id", id=3)
    refused("DELETE FROM products", "fk_orders_product_id")
    flask_migrate.downgrade(revision="0015_ended_together")
    refused(OLD_ORDER.replace("7, 1,", "7, 9,"), "fk_orders_product_id", id=3)
    refused(
        OLD_ORDER.replace("'key-' || :id", "'key-1'"), "uq_orders_user_id_idempotency_key", id=3
    )
    refused("DELETE FROM products", "fk_orders_product_id")


def refused(statement: str, why: str, **values: object) -> None:
    with pytest.raises(DBAPIError, match=why):
        db.session.execute(text(statement), values)
    db.session.rollback()


STORE = OLD_ORDER.replace("7, 1,", "7, 2,").replace(":id", "5")
DELETE = "DELETE FROM products WHERE id = 2"


@pytest.mark.parametrize(("first_one", "second"), [(STORE, DELETE), (DELETE, STORE)])
def test_a_product_is_not_deleted_under_its_orders(app, first_one, second):
    """Of an order that is stored and a deletion at once the later one is refused."""
    with app.app_context():
        product = "INSERT INTO products (id, name, price_cents, currency) VALUES (2, 'x', 1, 'USD')"
        db.session.execute(text(product.replace("VALUES", "OVERRIDING SYSTEM VALUE VALUES")))
        db.session.commit()

        def do_second() -> None:
            with db.engine.begin() as connection:
                connection.execute(text(second))

        with db.engine.connect() as connection:
            connection.execute(text(first_one))
            refusal = pytest.raises(DBAPIError, match="fk_orders_product_id")
            with refusal, beside(app, do_second), ending(connection):
                wait_until(waits_for_a_row, what="the second one to wait")
                connection.commit()
        orphans = "SELECT count(*) FROM orders WHERE product_id NOT IN (SELECT id FROM products)"
        assert db.session.scalar(text(orphans)) == 0
