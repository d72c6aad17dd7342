"""What PostgreSQL holds at the end of a run, as the checker wants it."""

import contextlib

import psycopg2
from checker import Movement, Order


def read_rows(dsn: str) -> tuple[list[Order], list[Order], list[Movement]]:
    """Return the orders, the dead letters and the movements."""
    with contextlib.closing(psycopg2.connect(dsn)) as connection, connection.cursor() as cursor:
        cursor.execute(
            "SELECT id, user_id, product_id, quantity, idempotency_key, status FROM orders"
        )
        orders = [Order(*row) for row in cursor]
        cursor.execute(
            "SELECT order_id, user_id, product_id, quantity, payload, error FROM dead_letters"
        )
        letters = [Order(*row) for row in cursor]
        cursor.execute(
            "SELECT id, product_id, kind, units, order_id, idempotency_key, applied_at IS NOT NULL"
            " FROM stock_movements"
        )
        movements = [Movement(*row) for row in cursor]
    return orders, letters, movements
