"""Measure the feed and webhooks: what they cost the drain, and how fast they follow.

    python stress/bench_feed.py [--orders 100000] [--rounds 3]

Starts its own servers in a scratch directory. Each part ends by itself after PART_SECONDS and tells
what it has. Costs are CPU time per order, of this process and PostgreSQL, compared in pairs of
runs, in turn. With --orders 1000000 the webhooks' figure is no longer extrapolated.
"""

import argparse
import http.client
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "stress")]

import flask_migrate
import psutil
import psycopg2
from client import free_port
from flask import Flask, current_app
from sqlalchemy import text

from app import create_app
from app.audit import CLI
from app.books import recovery
from app.config import load_settings
from app.extensions import db, stock
from app.feed import numbering, reading
from app.orders.drain import drain_batch
from app.run.embedded import PostgresServer, RedisServer
from app.stock.keys import KEYS

TOKEN = "fst_token-of-the-benchmark-of-the-feed"
SECRET = "secret-key-of-the-benchmark-of-the-feed"
# The writer's own pace, above the goal of 20,000: at the goal itself it could only just miss it.
EVENTS_PER_SECOND = 25_000
DRAINED = 10_000
# So long a part may take; one that is not done by then tells how far it came.
PART_SECONDS = 40
# Of the PostgreSQL that was started here.
PIDS: set[int] = set()
STORED = text("""
    WITH batch AS (
      INSERT INTO batches (job_id, worker, first_order_id, last_order_id, orders, dead_letters)
      VALUES ('bench', 'bench', :first, :last, :last - :first + 1, 0) RETURNING id)
    INSERT INTO orders (id, user_id, product_id, quantity, unit_price_cents, currency,
                        claimed_at, reference, batch_id)
    SELECT n, n, 1, 1, 99999, 'USD', now(), 'cart-' || n, batch.id
    FROM generate_series(CAST(:first AS bigint), :last) n, batch
""")
# An order's later step, as states.py tells it.
WRITE = """
    INSERT INTO new_events (type, order_id, sequence, body)
    SELECT 'order.cancelled', n, 1, json_build_object('order', json_build_object('id', n,
      'status', 'CANCELLED', 'userId', n::text, 'productId', 1, 'quantity', 1, 'cancelledQuantity',
      1, 'unitPriceCents', 99999, 'currency', 'USD', 'reference', 'cart-' || n, 'createdAt', now(),
      'storedAt', now(), 'endedAt', now(), 'endReason', 'bench', 'heldUntil', NULL, 'payment',
      NULL),
      'units', 1, 'reason', 'bench')
    FROM generate_series(1, %s) n
"""
# Takes what comes, and counts; as fast as a consumer can be in a few lines.
CONSUMER = """
import asyncio, sys
async def serve(reader, writer):
    try:
        while True:
            head = await reader.readuntil(b"\\r\\n\\r\\n")
            length = [l for l in head.lower().split(b"\\r\\n") if l.startswith(b"content-length")]
            await reader.readexactly(int(length[0].split(b":")[1]))
            if sys.argv[1] == "hang":
                await asyncio.sleep(3600)
            writer.write(b"HTTP/1.1 204 No Content\\r\\n\\r\\n")
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()
async def main():
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()
asyncio.run(main())
"""


def timed(act: Callable[[], object]) -> float:
    started = time.perf_counter()
    act()
    return time.perf_counter() - started


def claim(count: int, ids: Iterator[int]) -> None:
    """Put so many orders into the outbox, as claims do; nobody drains meanwhile."""
    now = int(time.time() * 1000)
    for _ in range(0, count, 1000):
        with stock.client.pipeline(transaction=False) as pipe:
            for order in [next(ids) for _ in range(1000)]:
                pipe.xadd(KEYS.outbox, {"order": f"{order} 1 1 99999 USD {now} "}, f"{order}-0")
            pipe.execute()


def drain() -> None:
    more = True
    while more:
        # A machine that is too busy ends a transaction: as a worker does, again.
        with suppress(psycopg2.OperationalError):
            more = drain_batch("bench", "bench").more


def number_all() -> None:
    while (found := numbering.number_events()) and found.more:
        pass


@contextmanager
def numbering_beside() -> Iterator[None]:
    """Number events a few times a second beside what is measured, as a worker does."""
    stopped = threading.Event()
    app: Flask = current_app._get_current_object()  # type: ignore[attr-defined]

    def number() -> None:
        with app.app_context():
            while not stopped.is_set():
                if not (found := numbering.number_events()) or not found.more:
                    stopped.wait(0.2)

    thread = threading.Thread(target=number)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()
        number_all()


@contextmanager
def writing(dsn: str) -> Iterator[list[int]]:
    """Write steps of orders, faster than the goal, beside what is measured."""
    written = [0]
    script = (
        "import sys, time, psycopg2\n"
        f"connection = psycopg2.connect({dsn!r}); cursor = connection.cursor()\n"
        "started, told = time.monotonic(), 0\n"
        "while True:\n"
        f"    cursor.execute({WRITE!r}, ({EVENTS_PER_SECOND // 10},)); connection.commit()\n"
        f"    told += {EVENTS_PER_SECOND // 10}; print(told, flush=True)\n"
        f"    time.sleep(max(0, started + told / {EVENTS_PER_SECOND} - time.monotonic()))\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)

    def follow() -> None:
        for line in writer.stdout or ():
            written[0] = int(line)

    thread = threading.Thread(target=follow)
    thread.start()
    try:
        yield written
    finally:
        writer.kill()
        thread.join()


@contextmanager
def consumer(how: str) -> Iterator[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", CONSUMER, how], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}/"
    finally:
        process.kill()
        process.wait()


@contextmanager
def program(argv: list[str], environ: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        [sys.executable, *argv], cwd=ROOT, env=os.environ | environ, stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


def of_postgres() -> float:
    """Return the CPU seconds of the PostgreSQL that was started here, so far."""
    total = 0.0
    for server in psutil.process_iter():
        with suppress(psutil.Error):
            if server.pid in PIDS or server.ppid() in PIDS:
                times = server.cpu_times()
                total += times.user + times.system
    return total


def spent(act: Callable[[], object]) -> float:
    """Return the CPU seconds that an act takes of this process and PostgreSQL.

    To look through all processes takes as long as to number 10,000 orders: that is not counted.
    """
    before = of_postgres()
    mine = time.process_time()
    act()
    mine = time.process_time() - mine
    return mine + of_postgres() - before


def paired(name: str, rounds: int, plain: Callable[[], float], other: Callable[[], float]) -> None:
    """Print the median ratio of two measured runs, taken in turn."""
    if not rounds:
        return
    pairs = []
    began = time.monotonic()
    for number in range(rounds):
        if pairs and time.monotonic() - began > PART_SECONDS:
            break
        order = (plain, other) if number % 2 == 0 else (other, plain)
        seconds = {run: run() for run in order}
        pairs.append(seconds[other] / seconds[plain])
    told = ", ".join(f"{ratio:.3f}" for ratio in pairs)
    print(f"{name}: {statistics.median(pairs):.3f} (pairs: {told})", flush=True)


def store(first: int, count: int) -> None:
    """Store orders in batches, as drains do, past Redis."""
    for start in range(first, first + count, 2000):
        db.session.execute(STORED, {"first": start, "last": min(start + 2000, first + count) - 1})
        db.session.commit()


def measure(app: Flask, environ: dict[str, str], dsn: str, orders: int, rounds: int) -> None:
    client = app.test_client()
    bearer = {"Authorization": f"Bearer {TOKEN}"}
    body = {"productId": 1, "amount": 1_000_000}
    assert client.post("/products/restock", json=body, headers=bearer).status_code == 200
    ids = iter(range(1, 2**40))
    numbering.keep_partitions()

    def plain() -> float:
        claim(DRAINED, ids)
        return spent(drain)

    def numbered() -> float:
        claim(DRAINED, ids)

        def both() -> None:
            drain()
            number_all()

        return spent(both)

    plain()
    number_all()
    claim(DRAINED, ids)
    seconds = 0.0

    def timed_drain() -> None:
        nonlocal seconds
        seconds = timed(drain)

    drained, numbers = spent(timed_drain), spent(number_all)
    print(
        f"CPU: {1e6 * drained / DRAINED:.1f} µs to drain an order, "
        f"{1e6 * numbers / DRAINED:.2f} µs to number it: {100 * numbers / drained:.1f} % more"
    )
    print(f"drain without a feed: {DRAINED / seconds:,.0f} orders/s, each of them an event")
    paired("the same with the feed, CPU as a multiple", rounds, plain, numbered)
    claim(DRAINED, ids)
    with numbering_beside(), writing(dsn) as written:
        time.sleep(0.5)
        began, before = time.monotonic(), written[0]
        drain()
        while time.monotonic() - began < 3:
            time.sleep(0.1)
        rate = (written[0] - before) / (time.monotonic() - began)
    print(f"steps of other orders written beside drain and numbering: {rate:,.0f}/s", flush=True)

    def beside(url: str) -> Callable[[], float]:
        def run() -> float:
            made = client.post("/webhooks", json={"url": url}, headers=bearer)
            try:
                with program(["webhooks.py"], environ):
                    time.sleep(2)
                    claim(DRAINED, ids)
                    return spent(drain)
            finally:
                client.delete(made.headers["Location"], headers=bearer)

        return run

    with consumer("hang") as url:
        paired("drain beside a webhook that hangs", rounds, plain, beside(url))
    paired("drain beside a webhook that is down", rounds, plain, beside("http://127.0.0.1:9/"))
    number_all()

    start = reading.ends()
    store(10_000_000, orders)
    seconds = timed(number_all)
    head = reading.ends().head
    print(f"{head - start.head:,} orders of batches numbered in {seconds:.2f} s")

    with consumer("take") as url:
        made = client.post(
            "/webhooks", json={"url": url, "after": start.cursor(start.head)}, headers=bearer
        ).json
        began = time.monotonic()
        with program(["webhooks.py"], environ):
            sent = 0
            long_enough = began + max(PART_SECONDS, orders / 1000)
            while sent < orders and time.monotonic() < long_enough:
                time.sleep(0.2)
                told = client.get(f"/webhooks/{made['id']}", headers=bearer).json
                sent = int(told["after"].rpartition("-")[2]) - start.head
        seconds = time.monotonic() - began
        each = sent / seconds
        print(
            f"webhook: {sent:,} orders in {seconds:.1f} s by one worker, its start included: "
            f"{each:,.0f}/s"
            + ("" if sent >= 1_000_000 else f"; 1,000,000 would take {1e6 / each / 60:.1f} min")
        )

    port = free_port()
    web = environ | {"PORT": str(port), "WEB_WORKERS": "1"}
    with program(["-m", "app.run.serve"], web):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        after, read = start.cursor(start.head), 0
        # The supervisor listens before the first process can answer.
        deadline, answers = time.monotonic() + PART_SECONDS, False
        while not answers and time.monotonic() < deadline:
            try:
                connection.request("GET", "/healthz")
                answers = connection.getresponse().read() != b""
            except (OSError, http.client.HTTPException):
                connection.close()
                time.sleep(0.1)
        began = time.monotonic()
        while time.monotonic() - began < PART_SECONDS:
            connection.request("GET", f"/orders/events?limit=1000&after={after}", headers=bearer)
            page = json.loads(connection.getresponse().read())
            if not page["events"]:
                break
            read, after = read + len(page["events"]), page["next"]
        seconds = time.monotonic() - began
        print(f"reader over HTTP, its JSON parsed: {read:,} events, {read / seconds:,.0f}/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--orders", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3, help="pairs; 0 leaves them out")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        servers = RedisServer(folder), PostgresServer(folder)
        try:
            for server in servers:
                server.start()
            if servers[1].process:
                PIDS.add(servers[1].process.pid)
                PIDS.update(p.pid for p in psutil.Process(servers[1].process.pid).children(True))
            environ = {
                "REDIS_URL": servers[0].url,
                "DATABASE_URL": servers[1].url,
                "DATA_DIR": str(folder / "data"),
                "SECRET_KEY": SECRET,
                "ADMIN_API_TOKEN": TOKEN,
                "ADMIN_PASSWORD": "password-of-the-benchmark",
                "PURCHASE_USER_LIMIT": "off",
                "PURCHASE_ADDRESS_LIMIT": "off",
                "WEBHOOK_ALLOW_PRIVATE": "on",
            }
            app = create_app(replace(load_settings(environ)))
            with app.app_context():
                flask_migrate.upgrade()
                recovery.reset(CLI)
                dsn = servers[1].url.replace("+psycopg2", "")
                measure(app, environ, dsn, options.orders, options.rounds)
        finally:
            for server in servers:
                server.stop()


if __name__ == "__main__":
    main()
