"""States of an order after the claim, units returned part by part, and acts that wait for an order.

A system of 0.1.0 with a million orders goes on selling, storing and cancelling beside it: columns
with constant defaults, constraints that are checked after they are in force, indexes made
CONCURRENTLY; only orders that are cancelled already are written again, some thousands at a time.
Every step is a transaction of its own and can be repeated, so a migration that was killed begins
again.
"""

import sqlalchemy as sa
from alembic import context, op
from online import add_check, add_index, lock_briefly
from sqlalchemy.dialects import postgresql

revision = "0008_order_states"
down_revision = "0007_user_names"
branch_labels = None
depends_on = None

ROWS_AT_ONCE = 5000

COLUMNS = [
    "orders ADD COLUMN IF NOT EXISTS returned_units integer NOT NULL DEFAULT 0,"
    " ADD COLUMN IF NOT EXISTS acts integer NOT NULL DEFAULT 0,"
    " ADD COLUMN IF NOT EXISTS held_until timestamptz,"
    " ADD COLUMN IF NOT EXISTS payment text",
    # An order's first act, as every one of 0.1.0 is.
    "stock_movements ADD COLUMN IF NOT EXISTS act integer NOT NULL DEFAULT 1",
    # Rows as many as products.
    "product_totals"
    " ADD COLUMN IF NOT EXISTS held_orders bigint NOT NULL DEFAULT 0,"
    " ADD COLUMN IF NOT EXISTS held_units bigint NOT NULL DEFAULT 0,"
    " ADD COLUMN IF NOT EXISTS released_orders bigint NOT NULL DEFAULT 0,"
    " ADD COLUMN IF NOT EXISTS released_units bigint NOT NULL DEFAULT 0,"
    " ADD COLUMN IF NOT EXISTS expired_orders bigint NOT NULL DEFAULT 0,"
    " ADD COLUMN IF NOT EXISTS expired_units bigint NOT NULL DEFAULT 0",
    "product_totals"
    " ADD COLUMN IF NOT EXISTS stored_orders bigint GENERATED ALWAYS AS (confirmed_orders"
    " + held_orders + cancelled_orders + released_orders + expired_orders) STORED NOT NULL,"
    " ADD COLUMN IF NOT EXISTS stored_units bigint GENERATED ALWAYS AS (confirmed_units"
    " + held_units + cancelled_units + released_units + expired_units) STORED NOT NULL",
    "sale ADD COLUMN IF NOT EXISTS epoch varchar(32)",
]

# Units that stand count by the order's status, those given back by how they ended: a part of an
# order that still stands was cancelled. Together they are the order's quantity at every moment,
# also while the rows of 0.1.0 do not tell yet that they gave back everything.
TOTALS = """
CREATE OR REPLACE PROCEDURE add_order_totals(
  product bigint, state text, n bigint, standing bigint, returned bigint)
LANGUAGE plpgsql AS $$
BEGIN
  CASE state
  WHEN 'CONFIRMED' THEN
    UPDATE product_totals SET confirmed_orders = confirmed_orders + n,
      confirmed_units = confirmed_units + standing, cancelled_units = cancelled_units + returned
    WHERE product_id = product;
  WHEN 'HELD' THEN
    UPDATE product_totals SET held_orders = held_orders + n,
      held_units = held_units + standing, cancelled_units = cancelled_units + returned
    WHERE product_id = product;
  WHEN 'CANCELLED' THEN
    UPDATE product_totals SET cancelled_orders = cancelled_orders + n,
      cancelled_units = cancelled_units + standing + returned WHERE product_id = product;
  WHEN 'RELEASED' THEN
    UPDATE product_totals SET released_orders = released_orders + n,
      released_units = released_units + standing + returned WHERE product_id = product;
  WHEN 'EXPIRED' THEN
    UPDATE product_totals SET expired_orders = expired_orders + n,
      expired_units = expired_units + standing + returned WHERE product_id = product;
  ELSE
    RAISE EXCEPTION 'there are no totals of orders that are %', state;
  END CASE;
END $$;

CREATE OR REPLACE FUNCTION sum_orders() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
  change record;
BEGIN
  IF TG_OP <> 'INSERT' THEN
    FOR change IN SELECT product_id, status, count(*) AS n,
                         sum(quantity - returned_units) AS standing, sum(returned_units) AS returned
                  FROM old_rows GROUP BY 1, 2 ORDER BY 1, 2 LOOP
      CALL add_order_totals(
        change.product_id, change.status, -change.n, -change.standing, -change.returned);
    END LOOP;
  END IF;
  IF TG_OP <> 'DELETE' THEN
    FOR change IN SELECT product_id, status, count(*) AS n,
                         sum(quantity - returned_units) AS standing, sum(returned_units) AS returned
                  FROM new_rows GROUP BY 1, 2 ORDER BY 1, 2 LOOP
      CALL add_order_totals(
        change.product_id, change.status, change.n, change.standing, change.returned);
    END LOOP;
  END IF;
  RETURN NULL;
END $$;
"""
FORMER_TOTALS = """
CREATE OR REPLACE FUNCTION sum_orders() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
  change record;
BEGIN
  IF TG_OP <> 'INSERT' THEN
    FOR change IN SELECT product_id, status, count(*) AS n, sum(quantity) AS units
                  FROM old_rows GROUP BY 1, 2 ORDER BY 1, 2 LOOP
      CALL add_order_totals(change.product_id, change.status, -change.n, -change.units);
    END LOOP;
  END IF;
  IF TG_OP <> 'DELETE' THEN
    FOR change IN SELECT product_id, status, count(*) AS n, sum(quantity) AS units
                  FROM new_rows GROUP BY 1, 2 ORDER BY 1, 2 LOOP
      CALL add_order_totals(change.product_id, change.status, change.n, change.units);
    END LOOP;
  END IF;
  RETURN NULL;
END $$;
DROP PROCEDURE add_order_totals(bigint, text, bigint, bigint, bigint);
"""
# A process of 0.1.0 sets the status alone: it gives back the whole order.
FORMER_CANCEL = """
CREATE OR REPLACE FUNCTION end_order() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  NEW.returned_units := NEW.quantity;
  NEW.acts := OLD.acts + 1;
  RETURN NEW;
END $$;
DROP TRIGGER IF EXISTS ended ON orders;
CREATE TRIGGER ended BEFORE UPDATE OF status ON orders FOR EACH ROW
  WHEN (NEW.status = 'CANCELLED' AND OLD.status <> 'CANCELLED' AND NEW.acts = OLD.acts)
  EXECUTE FUNCTION end_order()
"""
CANCELLED_BEFORE = f"""
WITH batch AS (SELECT id FROM orders
              WHERE status = 'CANCELLED' AND acts = 0 AND id > :after
              ORDER BY id LIMIT {ROWS_AT_ONCE} FOR UPDATE),
     done AS (UPDATE orders o SET returned_units = quantity, acts = 1 FROM batch
              WHERE o.id = batch.id RETURNING o.id)
SELECT max(id) FROM done
"""  # noqa: S608
CHECKS = [
    ("orders", "ck_orders_returned_units", "returned_units BETWEEN 0 AND quantity"),
    (
        "orders",
        "ck_orders_state",
        "CASE WHEN status IN ('CONFIRMED', 'HELD')"
        " THEN returned_units < quantity AND cancelled_at IS NULL"
        " WHEN status IN ('CANCELLED', 'RELEASED', 'EXPIRED')"
        " THEN returned_units = quantity AND cancelled_at IS NOT NULL ELSE false END",
    ),
    ("orders", "ck_orders_held", "status <> 'HELD' OR held_until IS NOT NULL"),
    ("orders", "ck_orders_payment", "length(payment) BETWEEN 1 AND 128"),
    (
        "stock_movements",
        "ck_stock_movements_what",
        "CASE kind WHEN 'initial' THEN units >= 0 WHEN 'restock' THEN units > 0"
        " WHEN 'return' THEN units > 0 WHEN 'reclaim' THEN units < 0"
        " WHEN 'correction' THEN true ELSE false END",
    ),
]
# What they replace, with their former conditions.
FORMER_CHECKS = [
    (
        "orders",
        "ck_orders_status",
        "(status = 'CONFIRMED' and cancelled_at is null)"
        " or (status = 'CANCELLED' and cancelled_at is not null)",
    ),
    (
        "stock_movements",
        "ck_stock_movements_kind",
        "kind in ('initial', 'restock', 'return', 'correction')",
    ),
    (
        "stock_movements",
        "ck_stock_movements_units",
        "units > 0 or kind = 'correction' or (kind = 'initial' and units = 0)",
    ),
]
INDEXES = [
    (
        "uq_stock_movements_order_id_act",
        "stock_movements (order_id, act) WHERE order_id IS NOT NULL",
    ),
    ("ix_orders_status_id", "orders (status, id) WHERE status <> 'CONFIRMED'"),
    ("ix_orders_held_until", "orders (held_until, id) WHERE status = 'HELD'"),
]
FORMER_INDEXES = [
    ("uq_stock_movements_order_id", "stock_movements (order_id) WHERE order_id IS NOT NULL"),
    ("ix_orders_cancelled", "orders (id) WHERE status = 'CANCELLED'"),
]


def upgrade():
    moment = postgresql.TIMESTAMP(timezone=True)
    with op.get_context().autocommit_block():
        for columns in COLUMNS:
            lock_briefly(f"ALTER TABLE {columns}")
        op.execute("UPDATE sale SET epoch = generation WHERE epoch IS NULL")
        op.create_table(
            "order_intents",
            sa.Column("epoch", sa.String(32), nullable=False),
            sa.Column("order_id", sa.BigInteger(), nullable=False),
            sa.Column("number", sa.Integer(), nullable=False),
            sa.Column("act", sa.String(9), nullable=False),
            sa.Column("units", sa.Integer()),
            sa.Column("reason", sa.Text()),
            sa.Column("payment", sa.Text()),
            sa.Column("actor", sa.Text(), nullable=False),
            sa.Column("address", sa.Text()),
            sa.Column("created_at", moment, server_default=sa.text("now()"), nullable=False),
            sa.Column("applied_at", moment),
            sa.Column("refusal", sa.Text()),
            sa.PrimaryKeyConstraint("epoch", "order_id", "number", name="pk_order_intents"),
            sa.CheckConstraint("act in ('cancel', 'confirm', 'release')", name="act"),
            sa.CheckConstraint("units > 0", name="units"),
            if_not_exists=True,
        )
        add_index("ix_order_intents_open", "order_intents (order_id) WHERE applied_at IS NULL")
        op.execute(TOTALS)
        lock_briefly(FORMER_CANCEL)
        tell_what_was_cancelled()
        for check in CHECKS:
            add_check(*check)
        for table, name, _ in FORMER_CHECKS:
            lock_briefly(f"ALTER TABLE {table} DROP CONSTRAINT IF EXISTS {name}")
        for index in INDEXES:
            add_index(*index)
        for name, _ in FORMER_INDEXES:
            op.execute(f"DROP INDEX CONCURRENTLY IF EXISTS {name}")


def tell_what_was_cancelled() -> None:
    """Write of each order that was cancelled before that all its units went back."""
    if context.is_offline_mode():
        op.execute("UPDATE orders SET returned_units = quantity, acts = 1"
                   " WHERE status = 'CANCELLED' AND acts = 0")  # fmt: skip
        return
    after = 0
    while after is not None:
        after = op.get_bind().scalar(sa.text(CANCELLED_BEFORE), {"after": after})


def downgrade():
    """Refused once an order is in a state, or returned in a part, that 0.1.0 can't tell."""
    op.execute(
        "DO $$ BEGIN IF EXISTS (SELECT FROM orders WHERE status NOT IN ('CONFIRMED', 'CANCELLED')"
        " OR (status = 'CONFIRMED' AND returned_units > 0)) THEN"
        " RAISE EXCEPTION 'there are orders that are held, or partly cancelled'; END IF; END $$"
    )
    for name, definition in FORMER_INDEXES:
        unique = "UNIQUE " if name.startswith("uq_") else ""
        op.execute(f"CREATE {unique}INDEX {name} ON {definition}")
    for name, _ in INDEXES:
        op.execute(f"DROP INDEX {name}")
    for table, name, condition in FORMER_CHECKS:
        op.execute(f"ALTER TABLE {table} ADD CONSTRAINT {name} CHECK ({condition})")
    for table, name, _ in CHECKS:
        op.execute(f"ALTER TABLE {table} DROP CONSTRAINT {name}")
    op.execute("DROP TRIGGER ended ON orders; DROP FUNCTION end_order()")
    op.execute(FORMER_TOTALS)
    op.drop_table("order_intents")
    op.drop_column("sale", "epoch")
    for column in ("stored_units", "stored_orders", "expired_units", "expired_orders",
                   "released_units", "released_orders", "held_units", "held_orders"):  # fmt: skip
        op.drop_column("product_totals", column)
    op.drop_column("stock_movements", "act")
    for column in ("payment", "held_until", "acts", "returned_units"):
        op.drop_column("orders", column)
