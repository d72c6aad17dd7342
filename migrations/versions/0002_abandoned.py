"""The ledger of abandoned dead letters, and of the ids that a rebuild skips."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

SUM_DEAD_LETTERS = """
CREATE OR REPLACE FUNCTION sum_dead_letters() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF TG_OP <> 'INSERT' THEN
    UPDATE product_totals t SET
      dead_orders = dead_orders - open, dead_units = dead_units - open_units,
      abandoned_units = abandoned_units - abandoned
    FROM (SELECT product_id, count(*) FILTER (WHERE resolution IS NULL) AS open,
                 coalesce(sum(quantity) FILTER (WHERE resolution IS NULL), 0) AS open_units,
                 coalesce(sum(quantity) FILTER (WHERE resolution = 'abandoned'), 0) AS abandoned
          FROM old_rows GROUP BY 1) c WHERE t.product_id = c.product_id;
  END IF;
  IF TG_OP <> 'DELETE' THEN
    UPDATE product_totals t SET
      dead_orders = dead_orders + open, dead_units = dead_units + open_units,
      abandoned_units = abandoned_units + abandoned
    FROM (SELECT product_id, count(*) FILTER (WHERE resolution IS NULL) AS open,
                 coalesce(sum(quantity) FILTER (WHERE resolution IS NULL), 0) AS open_units,
                 coalesce(sum(quantity) FILTER (WHERE resolution = 'abandoned'), 0) AS abandoned
          FROM new_rows GROUP BY 1) c WHERE t.product_id = c.product_id;
  END IF;
  RETURN NULL;
END $$;
"""

BEFORE = """
CREATE OR REPLACE FUNCTION sum_dead_letters() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF TG_OP <> 'INSERT' THEN
    UPDATE product_totals t SET dead_orders = dead_orders - n, dead_units = dead_units - units
    FROM (SELECT product_id, count(*) AS n, sum(quantity) AS units FROM old_rows
          WHERE resolution IS NULL GROUP BY 1) c WHERE t.product_id = c.product_id;
  END IF;
  IF TG_OP <> 'DELETE' THEN
    UPDATE product_totals t SET dead_orders = dead_orders + n, dead_units = dead_units + units
    FROM (SELECT product_id, count(*) AS n, sum(quantity) AS units FROM new_rows
          WHERE resolution IS NULL GROUP BY 1) c WHERE t.product_id = c.product_id;
  END IF;
  RETURN NULL;
END $$;
"""


def upgrade():
    op.add_column(
        "product_totals",
        sa.Column("abandoned_units", sa.BigInteger(), server_default="0", nullable=False),
    )
    op.add_column(
        "sale", sa.Column("first_order_id", sa.BigInteger(), server_default="1", nullable=False)
    )
    op.execute(SUM_DEAD_LETTERS)
    op.execute(
        "UPDATE product_totals t SET abandoned_units = units"
        " FROM (SELECT product_id, sum(quantity) AS units FROM dead_letters"
        "       WHERE resolution = 'abandoned' GROUP BY 1) c WHERE t.product_id = c.product_id"
    )


def downgrade():
    op.execute(BEFORE)
    op.drop_column("sale", "first_order_id")
    op.drop_column("product_totals", "abandoned_units")
