"""Fill the database as after a year of sales: a million orders, a million users, fifty products.

    python stress/generate.py [--orders 1000000] [--users 1000000] [--products 50] [--texts 10]

Works on the servers that the `flask` command would use, adds to what is there, and leaves Redis and
PostgreSQL agreeing: each product is restocked first by what the new orders take.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sqlalchemy import text

from app.audit import Actor
from app.books import recovery
from app.extensions import db
from app.products import catalogue, terms
from wsgi import app

ACTOR = Actor("stress/generate.py")
CHUNK = 100_000
# Every eighth order has an Idempotency-Key, every fourth a reference, every fiftieth was cancelled.
# Of each hundred users `texts` have a UUID for a name, which is made of their number.
ORDERS = text("""
    INSERT INTO orders (id, user_id, user_name, product_id, quantity, unit_price_cents, currency,
                        status, returned_units, acts, idempotency_key, reference, claimed_at,
                        persisted_at, cancelled_at, cancelled_by)
    SELECT :base + n, CASE WHEN who % 100 >= :texts THEN who END,
           CASE WHEN who % 100 < :texts THEN md5(who::text)::uuid::text END,
           (:products)[1 + n % cardinality(:products)],
           1 + n % 3, 1999, 'EUR', CASE WHEN n % 50 = 0 THEN 'CANCELLED' ELSE 'CONFIRMED' END,
           CASE WHEN n % 50 = 0 THEN 1 + n % 3 ELSE 0 END, (n % 50 = 0)::int,
           CASE WHEN n % 8 = 0 THEN 'generated-' || (:base + n) END,
           CASE WHEN n % 4 = 0 THEN 'cart-' || (:base + n) END,
           moment, moment + interval '0.2 s',
           CASE WHEN n % 50 = 0 THEN moment + interval '1 day' END,
           CASE WHEN n % 50 = 0 THEN 'support' END
    FROM generate_series(CAST(:first AS bigint), :last) n,
         LATERAL (SELECT now() - interval '365 days' * (1 - n::float / :orders) AS moment) m,
         LATERAL (SELECT 1 + floor(random() * :users + 0 * n)::bigint AS who) u
""")
# What the orders took was put in first, and what was cancelled came back.
MOVEMENTS = text("""
    INSERT INTO stock_movements (product_id, kind, units, reason, actor, applied_at)
    SELECT product_id, 'restock', sum(quantity), 'generated', :actor, now()
    FROM orders WHERE id > :base AND status = 'CONFIRMED' GROUP BY product_id
    UNION ALL
    SELECT product_id, 'restock', sum(quantity), 'generated', :actor, now()
    FROM orders WHERE id > :base AND status = 'CANCELLED' GROUP BY product_id
""")
CANCELLED = text("""
    INSERT INTO stock_movements (product_id, kind, units, reason, actor, user_id, user_name,
                                 order_id, applied_at)
    SELECT product_id, 'return', quantity, 'generated', :actor, user_id, user_name, id, now()
    FROM orders WHERE id > :base AND status = 'CANCELLED'
""")
LAST_ID = text("""
    SELECT greatest((SELECT max(id) FROM orders), (SELECT max(last_order_id) FROM batches),
                    (SELECT last_order_id FROM sale), 0)
""")


def generate(orders: int, users: int, products: int, texts: int) -> None:
    """Add the rows and rebuild the sale in Redis. Raises stock.Unavailable."""
    ids = []
    for number in range(products):
        new = {
            "name": f"Item {number + 1}",
            "priceCents": 1999,
            "currency": "EUR",
            "stock": 1000,
        }
        product = catalogue.create(terms.read_new(new), ACTOR).product
        ids.append(product["id"])
    base = db.session.scalar(LAST_ID)
    for first in range(1, orders + 1, CHUNK):
        last = min(first + CHUNK - 1, orders)
        db.session.execute(
            ORDERS,
            {
                "base": base,
                "users": users,
                "texts": texts,
                "products": ids,
                "first": first,
                "last": last,
                "orders": orders,
            },
        )
        db.session.commit()
        print(f"\r{last:,} orders", end="", flush=True)
    for statement in (MOVEMENTS, CANCELLED):
        db.session.execute(statement, {"base": base, "actor": ACTOR.name})
    db.session.commit()
    # Autovacuum would come to it in a while; a planner without figures guesses badly until then.
    db.session.connection(execution_options={"isolation_level": "AUTOCOMMIT"}).execute(
        text("VACUUM ANALYZE orders, stock_movements, product_totals")
    )
    print("\nrebuilding the sale in Redis")
    print(recovery.rebuild(ACTOR))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--orders", type=int, default=1_000_000)
    parser.add_argument("--users", type=int, default=1_000_000)
    parser.add_argument("--products", type=int, default=50)
    parser.add_argument("--texts", type=int, default=10, choices=range(101), metavar="PERCENT")
    wanted = parser.parse_args()
    if min(wanted.orders, wanted.users, wanted.products) < 1:
        parser.error("all numbers must be 1 or more")
    started = time.monotonic()
    with app.app_context():
        generate(wanted.orders, wanted.users, wanted.products, wanted.texts)
    print(f"done in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
