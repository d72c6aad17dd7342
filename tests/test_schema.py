"""Migrations and the rules that stand in the schema itself."""

import flask_migrate
import pytest
from alembic.script import ScriptDirectory
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from app.extensions import db
from app.products.movements import totals


def test_one_head_and_models_match(app):
    with app.app_context():
        script = ScriptDirectory(app.extensions["migrate"].directory)
        assert len(script.get_heads()) == 1
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
