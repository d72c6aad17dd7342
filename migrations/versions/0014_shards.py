"""A sale of several shards: which shard a batch is of, sums and issued order ids by shard.

A sale of one shard has the rows that it had: processes of an earlier version read and write them
beside this. `add_order_totals` of five arguments stays for a trigger that is running.
"""

import sqlalchemy as sa
from alembic import context, op
from online import add_check, add_index, lock_briefly
from sqlalchemy.dialects import postgresql

revision = "0014_shards"
down_revision = "0013_holds"
branch_labels = None
depends_on = None

COLUMNS = [
    "sale ADD COLUMN IF NOT EXISTS shards smallint NOT NULL DEFAULT 1",
    "batches ADD COLUMN IF NOT EXISTS shard smallint NOT NULL DEFAULT 0",
    "stock_movements ADD COLUMN IF NOT EXISTS parts bigint[]",
    # A row for each product: its new key is made in a moment.
    "product_totals ADD COLUMN IF NOT EXISTS shard smallint NOT NULL DEFAULT 0,"
    " DROP CONSTRAINT IF EXISTS pk_product_totals,"
    " ADD CONSTRAINT pk_product_totals PRIMARY KEY (product_id, shard)",
]
SUMS = (
    "confirmed_orders", "confirmed_units", "held_orders", "held_units", "cancelled_orders",
    "cancelled_units", "released_orders", "released_units", "expired_orders", "expired_units",
    "stored_orders", "stored_units", "dead_orders", "dead_units", "moved_units", "abandoned_units",
)  # fmt: skip
VIEW = f"""
CREATE OR REPLACE VIEW product_sums AS
SELECT product_id, {", ".join(f"sum({name})::bigint AS {name}" for name in SUMS)}
FROM product_totals GROUP BY product_id
"""  # noqa: S608

# An order's shard stands in its id, from this sale's first on. What is older was folded into row -1.
SHARD_OF = "CASE WHEN dealt = 1 THEN 0 WHEN {id} < begun THEN -1 ELSE {id} % dealt END"
READ_SALE = """
  SELECT shards, first_order_id INTO dealt, begun FROM sale;
  dealt := coalesce(dealt, 1);
"""
ORDERS = f"""
CREATE OR REPLACE PROCEDURE add_order_totals(
  product bigint, part bigint, state text, n bigint, standing bigint, returned bigint)
LANGUAGE plpgsql AS $$
BEGIN
  CASE state
  WHEN 'CONFIRMED' THEN
    UPDATE product_totals SET confirmed_orders = confirmed_orders + n,
      confirmed_units = confirmed_units + standing, cancelled_units = cancelled_units + returned
    WHERE product_id = product AND shard = part;
  WHEN 'HELD' THEN
    UPDATE product_totals SET held_orders = held_orders + n,
      held_units = held_units + standing, cancelled_units = cancelled_units + returned
    WHERE product_id = product AND shard = part;
  WHEN 'CANCELLED' THEN
    UPDATE product_totals SET cancelled_orders = cancelled_orders + n,
      cancelled_units = cancelled_units + standing + returned
    WHERE product_id = product AND shard = part;
  WHEN 'RELEASED' THEN
    UPDATE product_totals SET released_orders = released_orders + n,
      released_units = released_units + standing + returned
    WHERE product_id = product AND shard = part;
  WHEN 'EXPIRED' THEN
    UPDATE product_totals SET expired_orders = expired_orders + n,
      expired_units = expired_units + standing + returned
    WHERE product_id = product AND shard = part;
  ELSE
    RAISE EXCEPTION 'there are no totals of orders that are %', state;
  END CASE;
END $$;

CREATE OR REPLACE FUNCTION sum_orders() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
  change record;
  dealt bigint;
  begun bigint;
BEGIN
{READ_SALE}
  IF TG_OP <> 'INSERT' THEN
    FOR change IN SELECT product_id, {SHARD_OF.format(id="id")} AS part, status, count(*) AS n,
                         sum(quantity - returned_units) AS standing, sum(returned_units) AS returned
                  FROM old_rows GROUP BY 1, 2, 3 ORDER BY 1, 2, 3 LOOP
      CALL add_order_totals(change.product_id, change.part, change.status,
                            -change.n, -change.standing, -change.returned);
    END LOOP;
  END IF;
  IF TG_OP <> 'DELETE' THEN
    FOR change IN SELECT product_id, {SHARD_OF.format(id="id")} AS part, status, count(*) AS n,
                         sum(quantity - returned_units) AS standing, sum(returned_units) AS returned
                  FROM new_rows GROUP BY 1, 2, 3 ORDER BY 1, 2, 3 LOOP
      CALL add_order_totals(change.product_id, change.part, change.status,
                            change.n, change.standing, change.returned);
    END LOOP;
  END IF;
  RETURN NULL;
END $$;
"""
LETTER_SHARD = SHARD_OF.format(id="split_part(stream_id, '-', 1)::bigint")
LETTERS = """
SELECT product_id, {shard} AS part, count(*) FILTER (WHERE resolution IS NULL) AS open,
       coalesce(sum(quantity) FILTER (WHERE resolution IS NULL), 0) AS open_units,
       coalesce(sum(quantity) FILTER (WHERE resolution = 'abandoned'), 0) AS abandoned
FROM {rows} WHERE product_id IS NOT NULL GROUP BY 1, 2
"""
DEAD_LETTERS = f"""
CREATE OR REPLACE FUNCTION sum_dead_letters() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
  dealt bigint;
  begun bigint;
BEGIN
{READ_SALE}
  IF TG_OP <> 'INSERT' THEN
    UPDATE product_totals t SET
      dead_orders = dead_orders - open, dead_units = dead_units - open_units,
      abandoned_units = abandoned_units - abandoned
    FROM ({LETTERS.format(shard=LETTER_SHARD, rows="old_rows")}) c
    WHERE t.product_id = c.product_id AND t.shard = c.part;
  END IF;
  IF TG_OP <> 'DELETE' THEN
    UPDATE product_totals t SET
      dead_orders = dead_orders + open, dead_units = dead_units + open_units,
      abandoned_units = abandoned_units + abandoned
    FROM ({LETTERS.format(shard=LETTER_SHARD, rows="new_rows")}) c
    WHERE t.product_id = c.product_id AND t.shard = c.part;
  END IF;
  RETURN NULL;
END $$;
"""
# Of one shard a movement counts from the beginning, and Redis is told of it later. Of several it
# counts once it is applied, where its parts are. It never waits for a row that is no shard's.
FLOWS = """
SELECT product_id, -1 AS part, {sign} units AS units FROM {rows}
WHERE applied_at IS NOT NULL AND parts IS NULL
UNION ALL
SELECT product_id, number - 1, {sign} part FROM {rows}, unnest(parts) WITH ORDINALITY AS of (part, number)
WHERE applied_at IS NOT NULL
"""
ADD_FLOWS = """
    FOR change IN SELECT product_id, part, sum(units) AS units FROM ({flows}) flows
                  GROUP BY 1, 2 HAVING sum(units) <> 0 ORDER BY 1, 2 LOOP
      UPDATE product_totals SET moved_units = moved_units + change.units
      WHERE product_id = change.product_id AND shard = change.part;
    END LOOP;
"""
OLD, NEW = FLOWS.format(sign="-", rows="old_rows"), FLOWS.format(sign="", rows="new_rows")
MOVEMENTS = f"""
CREATE OR REPLACE FUNCTION sum_movements() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
  change record;
  dealt bigint;
  begun bigint;
BEGIN
{READ_SALE}
  IF dealt = 1 THEN
    IF TG_OP <> 'INSERT' THEN
      UPDATE product_totals t SET moved_units = moved_units - c.units
      FROM (SELECT product_id, sum(units) AS units FROM old_rows GROUP BY 1) c
      WHERE t.product_id = c.product_id;
    END IF;
    IF TG_OP <> 'DELETE' THEN
      UPDATE product_totals t SET moved_units = moved_units + c.units
      FROM (SELECT product_id, sum(units) AS units FROM new_rows GROUP BY 1) c
      WHERE t.product_id = c.product_id;
    END IF;
    RETURN NULL;
  END IF;
  CASE TG_OP
  WHEN 'INSERT' THEN {ADD_FLOWS.format(flows=NEW)}
  WHEN 'DELETE' THEN {ADD_FLOWS.format(flows=OLD)}
  ELSE {ADD_FLOWS.format(flows=f"{OLD} UNION ALL {NEW}")}
  END CASE;
  RETURN NULL;
END $$;
"""  # noqa: S608
PRODUCTS = """
CREATE OR REPLACE FUNCTION add_product_totals() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
  dealt bigint;
BEGIN
  SELECT shards INTO dealt FROM sale;
  INSERT INTO product_totals (product_id, shard)
  SELECT new.id, number FROM generate_series(-1, coalesce(dealt, 1) - 1) AS number
  WHERE number >= 0 OR dealt > 1;
  RETURN NULL;
END $$;
"""


def upgrade():
    with op.get_context().autocommit_block():
        for columns in COLUMNS:
            lock_briefly(f"ALTER TABLE {columns}")
        add_check("sale", "ck_sale_shards", "shards IN (1, 2, 3, 4, 6, 8, 12, 24)")
        op.create_table(
            "sale_shards",
            sa.Column("shard", sa.SmallInteger(), autoincrement=False, nullable=False),
            sa.Column("last_order_id", sa.BigInteger(), nullable=False),
            sa.Column("sampled_at", postgresql.TIMESTAMP(timezone=True)),
            sa.PrimaryKeyConstraint("shard", name="pk_sale_shards"),
            if_not_exists=True,
        )
        op.execute(VIEW)
        for function in (ORDERS, DEAD_LETTERS, MOVEMENTS, PRODUCTS):
            op.execute(function)
        add_index("ix_batches_shard_id", "batches (shard, id)")


# As they were; sum_orders and sum_dead_letters stand in the versions that made them.
FORMER = """
CREATE OR REPLACE FUNCTION sum_movements() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF TG_OP <> 'INSERT' THEN
    UPDATE product_totals t SET moved_units = moved_units - c.units
    FROM (SELECT product_id, sum(units) AS units FROM old_rows GROUP BY 1) c
    WHERE t.product_id = c.product_id;
  END IF;
  IF TG_OP <> 'DELETE' THEN
    UPDATE product_totals t SET moved_units = moved_units + c.units
    FROM (SELECT product_id, sum(units) AS units FROM new_rows GROUP BY 1) c
    WHERE t.product_id = c.product_id;
  END IF;
  RETURN NULL;
END $$;
CREATE OR REPLACE FUNCTION add_product_totals() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  INSERT INTO product_totals (product_id) VALUES (new.id);
  RETURN NULL;
END $$;
"""


def downgrade():
    """Refused for a sale of several shards: `flask rebuild` with SHARDS=1 makes it one."""
    op.execute(
        "DO $$ BEGIN IF EXISTS (SELECT FROM sale WHERE shards > 1) THEN"
        " RAISE EXCEPTION 'the sale has several shards'; END IF; END $$"
    )
    op.drop_index("ix_batches_shard_id", "batches")
    for version, name in (("0008_order_states", "TOTALS"), ("0002", "SUM_DEAD_LETTERS")):
        op.execute(getattr(context.script.get_revision(version).module, name))
    op.execute(FORMER)
    op.execute("DROP PROCEDURE add_order_totals(bigint, bigint, text, bigint, bigint, bigint)")
    op.execute("DROP VIEW product_sums")
    op.execute(
        "ALTER TABLE product_totals DROP CONSTRAINT pk_product_totals, DROP COLUMN shard,"
        " ADD CONSTRAINT pk_product_totals PRIMARY KEY (product_id)"
    )
    op.drop_table("sale_shards")
    op.drop_column("stock_movements", "parts")
    op.drop_column("batches", "shard")
    op.drop_column("sale", "shards")
