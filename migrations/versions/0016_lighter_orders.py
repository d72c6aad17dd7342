"""Orders cost less to store and to change: no foreign key to products, one index for a key.

The foreign key looked the product up for each order, a third of what storing one took. The sums'
trigger has each product of a batch in hand once, and refuses what is unknown in the same words; a
trigger of the products refuses to delete one that has orders. An order is found by its key alone
by the index that keeps a user's keys apart. Indexes are made and dropped CONCURRENTLY, no row is
rewritten, every step can be repeated, and processes of an earlier version go on beside it.
"""

from alembic import context, op
from online import add_index, lock_briefly

revision = "0016_lighter_orders"
down_revision = "0015_ended_together"
branch_labels = None
depends_on = None

SUMS = """
SELECT product_id, CASE WHEN dealt = 1 THEN 0 WHEN id < begun THEN -1 ELSE id % dealt END AS part,
       status, count(*) AS n, sum(quantity - returned_units) AS standing,
       sum(returned_units) AS returned
FROM {rows} GROUP BY 1, 2, 3 ORDER BY 1, 2, 3
"""
# Once its row is added to, it is locked: what is not there then was deleted meanwhile, or never was.
ORDERS = f"""
CREATE OR REPLACE FUNCTION sum_orders() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
  change record;
  dealt bigint;
  begun bigint;
BEGIN
  SELECT shards, first_order_id INTO dealt, begun FROM sale;
  dealt := coalesce(dealt, 1);
  IF TG_OP <> 'INSERT' THEN
    FOR change IN {SUMS.format(rows="old_rows")} LOOP
      CALL add_order_totals(change.product_id, change.part, change.status,
                            -change.n, -change.standing, -change.returned);
    END LOOP;
  END IF;
  IF TG_OP <> 'DELETE' THEN
    FOR change IN {SUMS.format(rows="new_rows")} LOOP
      CALL add_order_totals(change.product_id, change.part, change.status,
                            change.n, change.standing, change.returned);
      IF TG_OP = 'INSERT' AND NOT EXISTS (
        SELECT FROM product_totals WHERE product_id = change.product_id AND shard = change.part)
      THEN
        RAISE foreign_key_violation USING
          MESSAGE = 'insert or update on table "orders" violates foreign key constraint'
                    ' "fk_orders_product_id"',
          DETAIL = format('Key (product_id)=(%s) is not present in table "products".',
                          change.product_id);
      END IF;
    END LOOP;
  END IF;
  RETURN NULL;
END $$;
"""  # noqa: S608
# It waits for who adds to the sums, and whoever comes later finds no product.
KEPT = """
CREATE OR REPLACE FUNCTION keep_product_with_orders() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  PERFORM FROM product_totals WHERE product_id = OLD.id ORDER BY shard FOR UPDATE;
  IF EXISTS (SELECT FROM product_totals WHERE product_id = OLD.id AND stored_orders <> 0) THEN
    RAISE foreign_key_violation USING
      MESSAGE = 'update or delete on table "products" violates foreign key constraint'
                ' "fk_orders_product_id" on table "orders"',
      DETAIL = format('Key (id)=(%s) is still referenced from table "orders".', OLD.id);
  END IF;
  RETURN OLD;
END $$;
"""
KEEP = """
DROP TRIGGER IF EXISTS with_orders ON products;
CREATE TRIGGER with_orders BEFORE DELETE ON products FOR EACH ROW
  EXECUTE FUNCTION keep_product_with_orders();
"""
INDEXES = [
    (
        "uq_orders_idempotency_key_user_id",
        "orders (idempotency_key, user_id) WHERE idempotency_key IS NOT NULL",
    ),
    (
        "uq_orders_idempotency_key_user_name",
        "orders (idempotency_key, user_name)"
        " WHERE user_name IS NOT NULL AND idempotency_key IS NOT NULL",
    ),
]
FORMER_INDEXES = [
    (
        "uq_orders_user_id_idempotency_key",
        "orders (user_id, idempotency_key) WHERE idempotency_key IS NOT NULL",
    ),
    (
        "uq_orders_user_name_idempotency_key",
        "orders (user_name, idempotency_key)"
        " WHERE user_name IS NOT NULL AND idempotency_key IS NOT NULL",
    ),
    (
        "ix_orders_idempotency_key",
        "orders USING hash (idempotency_key) WHERE idempotency_key IS NOT NULL",
    ),
]


def upgrade():
    with op.get_context().autocommit_block():
        op.execute(ORDERS)
        op.execute(KEPT)
        lock_briefly(KEEP)
        lock_briefly("ALTER TABLE orders DROP CONSTRAINT IF EXISTS fk_orders_product_id")
        replace(FORMER_INDEXES, INDEXES)


def downgrade():
    foreign_key = "fk_orders_product_id"
    with op.get_context().autocommit_block():
        replace(INDEXES, FORMER_INDEXES)
        lock_briefly(
            f"ALTER TABLE orders DROP CONSTRAINT IF EXISTS {foreign_key}, ADD CONSTRAINT"
            f" {foreign_key} FOREIGN KEY (product_id) REFERENCES products (id) NOT VALID"
        )
        op.execute(f"ALTER TABLE orders VALIDATE CONSTRAINT {foreign_key}")
        lock_briefly("DROP TRIGGER IF EXISTS with_orders ON products")
        op.execute("DROP FUNCTION keep_product_with_orders")
        op.execute(context.script.get_revision("0014_shards").module.ORDERS)


def replace(former, indexes):
    for index in indexes:
        add_index(*index)
    for name, _ in former:
        op.execute(f"DROP INDEX CONCURRENTLY IF EXISTS {name}")
