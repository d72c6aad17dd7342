"""What holds cost: confirmations a second, and how soon the units of ended holds are back on sale.

    python stress/bench_holds.py [--seconds 4] [--holds 100000] [--port 8790]

Starts a system of its own. Needs wrk. Prints a line for each figure; exits 1 where a unit is lost.
"""

import argparse
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import psycopg2
from systems import ROOT, Broken, Ours, Users, cpu_seconds, per_order, until, wrk

sys.path.insert(0, str(ROOT))
from app.run.embedded import PostgresServer

STOCK = 10_000_000
CLAIM_SECONDS = 3


def held_product(system: Ours, stock: int = STOCK) -> int:
    product = system.product(stock)
    admin = {"Authorization": f"Bearer {system.api.token}"}
    system.api.call("PATCH", f"/products/{product}", {"holdSeconds": 86_400}, **admin)
    return product


def hold(system: Ours, product: int, base: int, cursor, seconds: float) -> tuple[int, int]:
    """Hold orders as fast as it goes, see them stored; return the first one and how many."""
    wrk("buy.lua", f"{system.url}/purchase", base, product, seconds=seconds)
    until(lambda: system.metrics(product)["queue_depth"] == 0, 180, "the drain")
    cursor.execute("SELECT min(id), count(*) FROM orders WHERE product_id = %s", (product,))
    return cursor.fetchone()


def confirm(system: Ours, cursor, users: Users, seconds: float) -> None:
    first, orders = hold(system, held_product(system), users.next(), cursor, CLAIM_SECONDS)
    before = cpu_seconds(system.roots)
    figures = wrk(
        "confirm.lua", system.url, first, orders, system.api.token, seconds=seconds, connections=64
    )
    cursor.execute("SELECT count(*) FROM orders WHERE status = 'CONFIRMED' AND payment IS NOT NULL")
    done = cursor.fetchone()[0]
    if figures["refused"] or not figures["ok"] <= done + max(0, figures["ok"] - orders):
        raise Broken(f"{figures['ok']} confirmed, {done} stored, {figures['refused']} refused")
    cost = per_order(before, cpu_seconds(system.roots), done)
    print(
        f"confirmations: {figures['rate']:,.0f}/s, p99 {figures['p99_us'] / 1000:.1f} ms,", end=" "
    )
    print(", ".join(f"{role} {value:.0f} µs" for role, value in cost.items()))


def end(system: Ours, cursor, users: Users, holds: int) -> None:
    """Let so many holds end in one second while another product sells."""
    product, other = held_product(system), system.product(STOCK)
    held = 0
    while held < holds:
        held = hold(system, product, users.next(), cursor, CLAIM_SECONDS)[1]
    url = f"{system.url}/purchase"
    alone = wrk("buy.lua", url, users.next(), other, seconds=5)["rate"]
    until(lambda: system.metrics(other)["queue_depth"] == 0, 180, "the drain")
    # As if each had been claimed at another moment of one second.
    cursor.execute(
        "UPDATE orders SET held_until = clock_timestamp() + (8 + random()) * interval '1 s'"
        " WHERE product_id = %s RETURNING held_until",
        (product,),
    )
    last = max(row[0] for row in cursor.fetchall())
    cursor.execute("SELECT extract(epoch FROM %s - clock_timestamp())", (last,))
    due = time.monotonic() + float(cursor.fetchone()[0]) + 2
    time.sleep(max(0, due - time.monotonic() - 3))
    beside: dict = {}
    seller = threading.Thread(
        target=lambda: beside.update(wrk("buy.lua", url, users.next(), other, seconds=7))
    )
    seller.start()
    until(
        lambda: system.metrics(product)["stock_remaining"] == STOCK, 120, "the units to come back"
    )
    took = time.monotonic() - due
    seller.join()
    cursor.execute(
        "SELECT extract(epoch FROM max(applied_at) - min(created_at)) FROM stock_movements"
        " WHERE order_ids IS NOT NULL AND product_id = %s",
        (product,),
    )
    span = float(cursor.fetchone()[0])
    print(f"{held:,} holds that ended in a second: back on sale {took:.1f} s after the last one's")
    print(f"  grace, {held / span:,.0f}/s; sold beside it {beside['rate']:,.0f}/s,", end=" ")
    print(f"alone {alone:,.0f}/s ({beside['rate'] / alone:.2f})")


def alone(system: Ours, cursor, users: Users) -> None:
    """Measure how long one hold's unit takes to come back, on an idle system."""
    waits = []
    for _ in range(5):
        product = held_product(system, 1)
        body = {"userId": users.next(), "productId": product}
        order = system.api.call("POST", "/purchase", body).body["orderId"]
        until(lambda: system.metrics(product)["queue_depth"] == 0, 10, "the drain")  # noqa: B023
        cursor.execute("UPDATE orders SET held_until = clock_timestamp() WHERE id = %s", (order,))
        started = time.monotonic()
        until(lambda: system.metrics(product)["stock_remaining"], 30, "the unit")  # noqa: B023
        waits.append(time.monotonic() - started)
    print(f"one hold, idle: back on sale {sorted(waits)[2]:.2f} s after its end (median of 5)")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=4)
    parser.add_argument("--holds", type=int, default=100_000)
    parser.add_argument("--port", type=int, default=8790)
    args = parser.parse_args()
    users = Users()
    with tempfile.TemporaryDirectory() as folder, Ours(Path(folder), args.port).running() as system:
        connection = psycopg2.connect(PostgresServer(Path(folder)).url.replace("+psycopg2", ""))
        connection.autocommit = True
        try:
            with connection.cursor() as cursor:
                alone(system, cursor, users)
                confirm(system, cursor, users, args.seconds)
                if args.holds:
                    end(system, cursor, users, args.holds)
        except Broken as broken:
            print(f"BROKEN: {broken}")
            return 1
        finally:
            connection.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
