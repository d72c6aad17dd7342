"""The sums of products, dealt anew to shards when the sale is."""

from sqlalchemy import text

from ..extensions import db, stock
from ..products.movements import coming

SUMS = (
    "confirmed_orders", "confirmed_units", "held_orders", "held_units", "cancelled_orders",
    "cancelled_units", "released_orders", "released_units", "expired_orders", "expired_units",
    "dead_orders", "dead_units", "abandoned_units",
)  # fmt: skip
# What changes until the new shards are in force would count where it does not belong, or, where it
# waited for a row that is deleted then, not at all. Orders first: who changes one goes on to its
# movement.
STANDSTILL = text(
    "LOCK TABLE orders, products, dead_letters, stock_movements IN SHARE ROW EXCLUSIVE MODE"
)
# What is put on sale counts in a sale of one shard at once, in others when it is applied.
FOLD = text(f"""
WITH former AS (DELETE FROM product_totals RETURNING *), pending AS (
  SELECT product_id, sum(units) AS units FROM stock_movements WHERE applied_at IS NULL GROUP BY 1
), sums AS (
  SELECT product_id, {", ".join(f"sum({name}) AS {name}" for name in SUMS)},
         sum(moved_units) - CASE WHEN :former = 1 THEN coalesce(max(units), 0) ELSE 0 END AS moved,
         coalesce(max(units), 0) AS pending
  FROM former LEFT JOIN pending USING (product_id) GROUP BY 1
), whole AS (
  SELECT *, moved - (confirmed_units + held_units + cancelled_units + released_units
                     + expired_units + dead_units + abandoned_units) AS free FROM sums
)
INSERT INTO product_totals (product_id, shard, moved_units, {", ".join(SUMS)})
SELECT product_id, CASE WHEN :shards = 1 THEN 0 ELSE -1 END,
       CASE WHEN :shards = 1 THEN moved + pending ELSE moved - free END, {", ".join(SUMS)}
FROM whole
UNION ALL
-- The free units, dealt evenly: a shard begins with its part, and without any order.
SELECT product_id, number, floor(free / :shards) + (number < mod(mod(free, :shards) + :shards,
       :shards))::int, {", ".join("0" for _ in SUMS)}
FROM whole, generate_series(0, :shards - 1) AS number WHERE :shards > 1
""")  # noqa: S608
# A shard begins without any order, so that what was moved there is free.
DEBTS = text("""
SELECT product_id, sum(moved_units)::bigint FROM product_totals WHERE shard >= 0
GROUP BY 1 HAVING sum(moved_units) < 0
""")
DEAL = text(
    "UPDATE product_totals SET moved_units = :units WHERE product_id = :product AND shard = :shard"
)


def deal_anew(former: int, first_order_id: int) -> None:
    """Count all that was until now apart from the shards, and deal them what is free.

    In the transaction that names the new sale. `former` is how many shards it had; `first_order_id`
    is where the new one's ids begin.
    """
    shards = len(stock.shards)
    db.session.execute(STANDSTILL)
    if shards > 1 or former > 1:
        db.session.execute(FOLD, {"former": former, "shards": shards})
    if shards > 1:
        _deal_debts()
    db.session.execute(text("DELETE FROM sale_shards"))
    db.session.execute(
        text(
            "INSERT INTO sale_shards (shard, last_order_id, sampled_at)"
            " SELECT number, CAST(:first AS bigint) + number - :shards, now()"
            " FROM generate_series(0, :shards - 1) AS number WHERE :shards > 1"
        ),
        {"first": first_order_id, "shards": shards},
    )


def _deal_debts() -> None:
    """Deal what is less than nothing to the shards that will get the units for it.

    Such as those of a restock that Redis had, and sold, and PostgreSQL does not know that it had.
    Another shard would sell them once more.
    """
    debts: dict[int, int] = dict(db.session.execute(DEBTS).all())
    for product_id, units in (coming(list(debts)) if debts else {}).items():
        in_the_end = debts[product_id] + sum(units)
        for shard, comes in zip(stock.shards, units, strict=True):
            values = {
                "product": product_id,
                "shard": shard.part.shard,
                "units": shard.part.deals(in_the_end) - comes,
            }
            db.session.execute(DEAL, values)
