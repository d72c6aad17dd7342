"""Sums are locked in the order of their products, and not at all where they stay as they are.

A statement about several products' movements locked their sums in whatever order the plan had them:
two of them, or one and a drain, could wait for each other until PostgreSQL ended one. To mark
movements as applied took and gave back their units, and locked sums for nothing.
"""

from alembic import context, op

revision = "0017_sums_in_order"
down_revision = "0016_lighter_orders"
branch_labels = None
depends_on = None

READ_SALE = """
  SELECT shards, first_order_id INTO dealt, begun FROM sale;
  dealt := coalesce(dealt, 1);
"""
# Of one shard a movement counts from the beginning, and Redis is told of it later; its sums have one
# row. Of several it counts once it is applied, where its parts are.
FLOWS = """
SELECT product_id, NULL::bigint AS part, {sign} units AS units FROM {rows} WHERE dealt = 1
UNION ALL
SELECT product_id, -1, {sign} units FROM {rows}
WHERE dealt > 1 AND applied_at IS NOT NULL AND parts IS NULL
UNION ALL
SELECT product_id, number - 1, {sign} part FROM {rows}, unnest(parts) WITH ORDINALITY AS of (part, number)
WHERE dealt > 1 AND applied_at IS NOT NULL
"""
ADD_FLOWS = """
    FOR change IN SELECT product_id, part, sum(units) AS units FROM ({flows}) flows
                  GROUP BY 1, 2 HAVING sum(units) <> 0 ORDER BY 1, 2 LOOP
      UPDATE product_totals SET moved_units = moved_units + change.units
      WHERE product_id = change.product_id AND (change.part IS NULL OR shard = change.part);
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
  CASE TG_OP
  WHEN 'INSERT' THEN {ADD_FLOWS.format(flows=NEW)}
  WHEN 'DELETE' THEN {ADD_FLOWS.format(flows=OLD)}
  ELSE {ADD_FLOWS.format(flows=f"{OLD} UNION ALL {NEW}")}
  END CASE;
  RETURN NULL;
END $$;
"""
LETTERS = """
SELECT product_id,
       CASE WHEN dealt = 1 THEN 0 WHEN split_part(stream_id, '-', 1)::bigint < begun THEN -1
            ELSE split_part(stream_id, '-', 1)::bigint % dealt END AS part,
       {sign} count(*) FILTER (WHERE resolution IS NULL) AS open,
       {sign} coalesce(sum(quantity) FILTER (WHERE resolution IS NULL), 0) AS open_units,
       {sign} coalesce(sum(quantity) FILTER (WHERE resolution = 'abandoned'), 0) AS abandoned
FROM {rows} WHERE product_id IS NOT NULL GROUP BY 1, 2 ORDER BY 1, 2
"""
ADD_LETTERS = """
    FOR change IN {letters} LOOP
      UPDATE product_totals SET dead_orders = dead_orders + change.open,
        dead_units = dead_units + change.open_units,
        abandoned_units = abandoned_units + change.abandoned
      WHERE product_id = change.product_id AND shard = change.part;
    END LOOP;
"""
DEAD_LETTERS = f"""
CREATE OR REPLACE FUNCTION sum_dead_letters() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
  change record;
  dealt bigint;
  begun bigint;
BEGIN
{READ_SALE}
  IF TG_OP <> 'INSERT' THEN
{ADD_LETTERS.format(letters=LETTERS.format(sign="-", rows="old_rows"))}
  END IF;
  IF TG_OP <> 'DELETE' THEN
{ADD_LETTERS.format(letters=LETTERS.format(sign="", rows="new_rows"))}
  END IF;
  RETURN NULL;
END $$;
"""


def upgrade():
    op.execute(MOVEMENTS)
    op.execute(DEAD_LETTERS)


def downgrade():
    former = context.script.get_revision("0014_shards").module
    op.execute(former.MOVEMENTS)
    op.execute(former.DEAD_LETTERS)
