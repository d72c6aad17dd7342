"""Users by a text of the shop's, and the shop's reference of an order.

A system of 0.1.0 with a million orders goes on selling and storing beside it: columns without a
default, constraints that are checked after they are in force, indexes made CONCURRENTLY. No row is
rewritten, and no lock that stops writers is waited for longer than a second. Every step is a
transaction of its own and can be repeated, so a migration that was killed begins again.
"""

import logging
import time

import sqlalchemy as sa
from alembic import context, op
from sqlalchemy.exc import OperationalError

revision = "0007_user_names"
down_revision = "0006_pages"
branch_labels = None
depends_on = None

log = logging.getLogger("alembic.runtime.migration")

LOCK_NOT_AVAILABLE = "55P03"
# A minute and a half of tries; who still holds the table then is no transaction of ours.
ATTEMPTS = 60
PAUSE_SECONDS = 0.5

COLUMNS = [
    'orders ADD COLUMN IF NOT EXISTS user_name text COLLATE "C",'
    " ADD COLUMN IF NOT EXISTS reference text",
    'dead_letters ADD COLUMN IF NOT EXISTS user_name text COLLATE "C",'
    " ADD COLUMN IF NOT EXISTS reference text",
    'stock_movements ADD COLUMN IF NOT EXISTS user_name text COLLATE "C"',
]
NAMED = (
    "CASE WHEN user_name ~ '^[1-9][0-9]{0,15}$' THEN user_name::numeric > 9007199254740991"
    " ELSE user_name ~ '^[A-Za-z0-9._~:@|+-]{1,64}$' END"
)
CHECKS = [
    ("orders", "ck_orders_one_user", "num_nonnulls(user_id, user_name) = 1"),
    ("orders", "ck_orders_user_name", NAMED),
    ("orders", "ck_orders_reference", "length(reference) BETWEEN 1 AND 64"),
    ("dead_letters", "ck_dead_letters_one_user", "num_nonnulls(user_id, user_name) <= 1"),
    ("stock_movements", "ck_stock_movements_one_user", "num_nonnulls(user_id, user_name) <= 1"),
]
INDEXES = [
    ("ix_orders_user_name_id", "orders (user_name, id) WHERE user_name IS NOT NULL"),
    (
        "uq_orders_user_name_idempotency_key",
        "orders (user_name, idempotency_key)"
        " WHERE user_name IS NOT NULL AND idempotency_key IS NOT NULL",
    ),
    ("ix_orders_reference_id", "orders (reference, id) WHERE reference IS NOT NULL"),
    ("ix_dead_letters_user_name_id", "dead_letters (user_name, id) WHERE user_name IS NOT NULL"),
    ("ix_dead_letters_reference_id", "dead_letters (reference, id) WHERE reference IS NOT NULL"),
]


def upgrade():
    with op.get_context().autocommit_block():
        for columns in COLUMNS:
            alter(columns)
        for table, name, condition in CHECKS:
            # Of this name there can be only this one, from a try before.
            alter(
                f"{table} DROP CONSTRAINT IF EXISTS {name},"
                f" ADD CONSTRAINT {name} CHECK ({condition}) NOT VALID"
            )
        # Only now: an order of nobody was refused at every moment.
        alter("orders ALTER COLUMN user_id DROP NOT NULL")
        for table, name, _ in CHECKS:
            # Writers go on meanwhile.
            op.execute(f"ALTER TABLE {table} VALIDATE CONSTRAINT {name}")
        for name, definition in INDEXES:
            drop_unfinished(name)
            unique = "UNIQUE " if name.startswith("uq_") else ""
            op.execute(f"CREATE {unique}INDEX CONCURRENTLY IF NOT EXISTS {name} ON {definition}")


def alter(change: str) -> None:
    """Alter a table, which everybody waits for: not for longer than a second at a time."""
    for attempt in range(1, ATTEMPTS + 1):
        op.execute("SET lock_timeout = '1s'")
        try:
            op.execute(f"ALTER TABLE {change}")
            return
        except OperationalError as error:
            if getattr(error.orig, "pgcode", "") != LOCK_NOT_AVAILABLE or attempt == ATTEMPTS:
                raise
            log.warning("%s is in use, try %d of %d", change.split()[0], attempt, ATTEMPTS)
            time.sleep(PAUSE_SECONDS)
        finally:
            op.execute("RESET lock_timeout")


def drop_unfinished(index: str) -> None:
    """Drop an index that a killed CREATE INDEX CONCURRENTLY left: it is of no use, and stays so."""
    if context.is_offline_mode():
        return
    unfinished = sa.text(
        "SELECT EXISTS (SELECT FROM pg_index WHERE indexrelid = to_regclass(:name)"
        " AND NOT indisvalid)"
    )
    if op.get_bind().scalar(unfinished, {"name": index}):
        op.execute(f"DROP INDEX CONCURRENTLY {index}")


def downgrade():
    """Refused once a text bought something: its orders would be nobody's."""
    op.execute(
        "DO $$ BEGIN IF EXISTS (SELECT FROM orders WHERE user_name IS NOT NULL) THEN"
        " RAISE EXCEPTION 'there are orders of users with text ids'; END IF; END $$"
    )
    for name, _ in reversed(INDEXES):
        op.execute(f"DROP INDEX {name}")
    for table, name, _ in reversed(CHECKS):
        op.execute(f"ALTER TABLE {table} DROP CONSTRAINT {name}")
    op.execute("ALTER TABLE orders ALTER COLUMN user_id SET NOT NULL")
    for table, columns in (
        ("stock_movements", ["user_name"]),
        ("dead_letters", ["reference", "user_name"]),
        ("orders", ["reference", "user_name"]),
    ):
        for column in columns:
            op.drop_column(table, column)
