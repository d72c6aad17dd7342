"""The figures for Prometheus: the same from whichever process is asked, as they are kept in Redis.

The sale's own figures are read from Redis and PostgreSQL when asked for. What only a process knows
(how long its answers took, its memory) it adds to one hash in Redis, once a second.
"""

import contextlib
import logging
import os
import socket
import threading
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from ..extensions import db, stock
from ..problems import Unavailable
from ..stock.board import News
from ..stock.figures import View
from ..stock.outcomes import OUTCOMES
from . import health

log = logging.getLogger(__name__)

FLUSH_SECONDS = 1.0
# The state of a process is written less often: every write ends up in Redis's log on disk.
STATE_SECONDS = 5.0
STATE_LASTS_SECONDS = 15.0
# A healthy answer takes 1 to 20 ms; one without Redis up to 2 s.
DURATION_BOUNDS = (
    0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0,
)  # fmt: skip
BATCH_BOUNDS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
# Each product is some 20 series. Those with the lowest ids are told apart, the rest are one.
MOST_PRODUCTS = 200
# Few rows each, however many events there were.
FEED = text("""
    SELECT feed.head,
      greatest(0, extract(epoch FROM clock_timestamp() - least(
        (SELECT at FROM new_events ORDER BY id LIMIT 1),
        (SELECT persisted_at FROM batches WHERE event_number IS NULL ORDER BY id LIMIT 1),
        clock_timestamp()))) AS unnumbered,
      e."on", e.failing, e.off, e.failed, e.failing_seconds,
      greatest(0, feed.head - coalesce(e.number, feed.head)) AS behind
    FROM feed, LATERAL (
      SELECT count(*) FILTER (WHERE state = 'on' AND failures = 0) AS "on",
        count(*) FILTER (WHERE state = 'on' AND failures > 0) AS failing,
        count(*) FILTER (WHERE state = 'off' AND off_reason IS NULL) AS off,
        count(*) FILTER (WHERE off_reason IS NOT NULL) AS failed,
        min(number) FILTER (WHERE state = 'on') AS number,
        coalesce(max(extract(epoch FROM now() - failing_since)) FILTER (WHERE state = 'on'), 0)
          AS failing_seconds
      FROM webhook_endpoints) AS e
""")
# Told by who starts the processes (app/run/serve.py, app/run/supervisor.py): the field's beginning,
# the name, the causes.
RESTARTS = (
    ("restart", "web", ("died", "event_loop", "page_threads")),
    ("worker-restart", "worker", ("died", "standstill", "thread")),
)


class Meter:
    """What this process did: how long its purchases took, by status, and what it uses.

    `observe` costs well under a microsecond. Its two additions are not interrupted by another
    thread: CPython 3.11 and later yields only at calls and at the ends of loops.
    """

    def __init__(self, role: str) -> None:
        self.role = role
        self._name = f"{role}:{socket.gethostname()}:{os.getpid()}"
        self._rows: dict[str, list[float]] = {}
        self._sent: dict[str, list[float]] = {}
        self._counts: Counter[str] = Counter()
        self._sent_cpu = 0.0
        self._state_at = 0.0
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def observe(self, status: str, seconds: float) -> None:
        """Count one answer; `status` is the status line."""
        row = self._rows.get(status) or self._new_row(status)
        bucket = bisect_left(DURATION_BOUNDS, seconds)
        row[bucket] += 1
        row[-1] += seconds

    def _new_row(self, status: str) -> list[float]:
        self.start()
        row: list[float] = [0] * (len(DURATION_BOUNDS) + 1)
        return self._rows.setdefault(status, [*row, 0.0])

    def count(self, name: str) -> None:
        """Count what happens seldom, and report it."""
        self._counts[name] += 1
        self.start()

    def start(self) -> None:
        """Begin to report; only where something is counted, never in a command or after a fork."""
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="telemetry", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        while True:
            time.sleep(FLUSH_SECONDS)
            try:
                self.flush()
            except Unavailable:
                continue  # kept, and added when Redis is back
            except Exception:
                log.exception("the figures of this process can't be reported")

    def flush(self) -> None:
        """Add what was counted since the last time. Raises stock.Unavailable."""
        with self._lock:
            rows = {status: list(row) for status, row in list(self._rows.items())}
            counts = self._counts.copy()
            amounts: dict[str, int | float] = dict(counts)
            for status, row in rows.items():
                sent = self._sent.get(status) or [0] * len(row)
                for bucket, (now, before) in enumerate(zip(row[:-1], sent[:-1], strict=True)):
                    if now != before:
                        amounts[f"duration:{status[:3]}:{bucket}"] = now - before
                if row[-1] != sent[-1]:
                    amounts[f"duration:{status[:3]}:sum"] = row[-1] - sent[-1]
            cpu, moment = time.process_time(), time.monotonic()
            state = moment - self._state_at >= STATE_SECONDS
            if state:
                amounts[f"cpu:{self.role}"] = cpu - self._sent_cpu
            stock.board.count(amounts, (self._name, _state()) if state else None)
            self._sent = rows
            self._counts -= counts
            if state:
                self._state_at, self._sent_cpu = moment, cpu


def _state() -> dict[str, float]:
    """Return what this process uses; where the system doesn't tell, nothing."""
    state: dict[str, float] = {}
    with contextlib.suppress(OSError, ValueError, IndexError):
        with open("/proc/self/statm") as file:
            state["memory"] = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        state["files"] = len(os.listdir("/proc/self/fd"))
    return state


def count_batch(orders: int) -> None:
    """Count a batch that was stored. A Redis that fails costs the figure, not the batch."""
    with contextlib.suppress(Unavailable):
        bucket = f"batch:{bisect_left(BATCH_BOUNDS, orders)}"
        stock.board.count({bucket: 1, "batch:sum": orders})


def exposition() -> bytes:
    """Return every figure in Prometheus's text format, or those that servers still tell."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector())
    return generate_latest(registry)


class _Collector:
    def collect(self) -> Iterator[Metric]:
        up = GaugeMetricFamily(
            "flashsale_up", "Whether the server answers and takes writes.", labels=["server"]
        )
        for server, figures, takes_writes in (
            ("redis", _of_redis, _redis_takes_writes),
            ("postgres", _of_postgres, _postgres_takes_writes),
        ):
            found = []
            try:
                # What was told before a part failed is told.
                for metric in figures():
                    found.append(metric)
                up.add_metric([server], takes_writes())
            except (Unavailable, SQLAlchemyError):
                db.session.rollback()
                up.add_metric([server], 0)
            yield from found
        yield up


def _redis_takes_writes() -> bool:
    stock.try_write()
    return True


def _postgres_takes_writes() -> bool:
    return bool(db.session.scalar(text("SHOW transaction_read_only")) == "off")


def _gauge(name: str, meaning: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, meaning, value=value)


def _of_redis() -> Iterator[Metric]:
    ids = stock.product_ids()
    view = stock.view(ids[:MOST_PRODUCTS], ids[MOST_PRODUCTS:])
    yield _gauge("flashsale_sale_prepared", "Whether Redis holds the sale.", bool(view.generation))
    yield from _of_shards(view)
    news, found = stock.board.news(0), stock.board.counted(STATE_LASTS_SECONDS)
    counted = found.telemetry
    yield from _in_transit(news)
    yield from _of_products(view, found.refused)
    yield _gauge("flashsale_orders_waiting", "Orders claimed, not yet persisted.", view.waiting)
    oldest = view.oldest_claimed_ms
    age = max(0.0, news.now - oldest / 1000) if oldest else 0
    yield _gauge("flashsale_oldest_order_age_seconds", "Age of the oldest waiting order.", age)
    yield _durations(counted)
    yield _batches(counted)
    yield from _restarts(counted)
    lost = int(counted.get("hold_expired", 0))
    yield CounterMetricFamily(
        "flashsale_holds_lost", "Payments that came too late for their units.", value=lost
    )
    yield from _webhooks(counted)
    yield _gauge("flashsale_workers", "Worker processes seen lately.", news.workers)
    weak = health.weak_durability()
    yield _gauge("flashsale_redis_durable", "Whether Redis keeps every promise.", not weak)
    if news.proof:
        ok = bool(news.proof["ok"])
        yield _gauge("flashsale_ledger_ok", "Whether the ledger's sums agree.", ok)
        moment = float(news.proof["at"])
        yield _gauge(
            "flashsale_ledger_checked_timestamp_seconds",
            "When the ledger was last added up.",
            moment,
        )
    yield from _of_processes(found.processes, counted)


def _of_shards(view: View) -> Iterator[Metric]:
    up = GaugeMetricFamily(
        "flashsale_shard_up", "Whether a shard of the sale can be reached and sells.",
        labels=["shard"],
    )  # fmt: skip
    free = GaugeMetricFamily(
        "flashsale_shard_stock_units", "Units free to be sold, by shard.", labels=["shard"]
    )
    waiting = GaugeMetricFamily(
        "flashsale_shard_orders_waiting", "Orders not yet persisted, by shard.", labels=["shard"]
    )
    for number, part in (view.parts or {0: view}).items():
        shard = str(number)
        if isinstance(part, Unavailable):
            up.add_metric([shard], 0)
            continue
        up.add_metric([shard], bool(part.generation))
        free.add_metric([shard], part.sums()["free"])
        waiting.add_metric([shard], part.waiting)
    yield from (up, free, waiting)


def _in_transit(news: News) -> Iterator[Metric]:
    lent = GaugeMetricFamily(
        "flashsale_shard_in_transit_units",
        "Units that a shard lent and that are not yet given, by the newest proof.",
        labels=["shard"],
    )
    for shard, units in ((news.proof or {}).get("in_transit") or {}).items():
        lent.add_metric([shard], units)
    yield lent


def _of_products(view: View, refused: dict[str, str]) -> Iterator[Metric]:
    purchases = CounterMetricFamily(
        "flashsale_purchases", "Purchase requests decided.", labels=["product", "outcome"]
    )
    persisted = CounterMetricFamily(
        "flashsale_orders_persisted", "Orders stored in PostgreSQL.", labels=["product"]
    )
    units = CounterMetricFamily("flashsale_units_claimed", "Units sold.", labels=["product"])
    free = GaugeMetricFamily("flashsale_stock_units", "Units free to be sold.", labels=["product"])
    groups = {str(product): view.products[product] for product in sorted(view.products)}
    if view.others:
        groups["other"] = view.others
    for product, figures in groups.items():
        for outcome in OUTCOMES:
            total = figures.get(outcome, 0)
            # An outcome that never was is told for accepted alone, so that a rate can be taken.
            if total or outcome == "accepted":
                purchases.add_metric([product, outcome], total)
        persisted.add_metric([product], figures.get("persisted", 0))
        units.add_metric([product], figures.get("claimed", 0))
        free.add_metric([product], figures.get("free", 0))
    for outcome in OUTCOMES:
        if outcome in refused:
            purchases.add_metric(["none", outcome], int(refused[outcome]))
    yield from (purchases, persisted, units, free)


def _buckets(
    counted: dict[str, str], prefix: str, bounds: Sequence[float]
) -> list[tuple[str, float]]:
    """Return the cumulated buckets as prometheus_client takes them."""
    total = 0
    buckets: list[tuple[str, float]] = []
    for index, bound in enumerate((*bounds, "+Inf")):
        total += int(counted.get(f"{prefix}:{index}", 0))
        buckets.append((str(bound), total))
    return buckets


def _durations(counted: dict[str, str]) -> Metric:
    histogram = HistogramMetricFamily(
        "flashsale_purchase_duration_seconds",
        "Time from a purchase request to its answer.",
        labels=["status"],
    )
    statuses = {field.split(":")[1] for field in counted if field.startswith("duration:")}
    for status in sorted(statuses | {"200"}):
        prefix = f"duration:{status}"
        total = float(counted.get(f"{prefix}:sum", 0))
        histogram.add_metric([status], _buckets(counted, prefix, DURATION_BOUNDS), total)
    return histogram


def _batches(counted: dict[str, str]) -> Metric:
    return HistogramMetricFamily(
        "flashsale_batch_orders",
        "Orders stored by one batch.",
        buckets=_buckets(counted, "batch", BATCH_BOUNDS),
        sum_value=float(counted.get("batch:sum", 0)),
    )


def _restarts(counted: dict[str, str]) -> Iterator[Metric]:
    for field, role, causes in RESTARTS:
        restarts = CounterMetricFamily(
            f"flashsale_{role}_restarts",
            f"Times that a {role} process was started in place of one that ended by itself or no "
            "longer worked.",
            labels=["cause"],
        )
        for cause in causes:
            restarts.add_metric([cause], int(counted.get(f"{field}:{cause}", 0)))
        yield restarts


def _webhooks(counted: dict[str, str]) -> Iterator[Metric]:
    sent = CounterMetricFamily(
        "flashsale_webhook_attempts", "Deliveries sent to webhooks.", labels=["result"]
    )
    for result in ("delivered", "failed"):
        sent.add_metric([result], int(counted.get(f"webhook:{result}", 0)))
    yield sent
    yield CounterMetricFamily(
        "flashsale_webhook_events",
        "Events that webhooks took.",
        value=int(counted.get("webhook:events", 0)),
    )


def _of_processes(
    processes: dict[str, dict[str, Any]], counted: dict[str, str]
) -> Iterator[Metric]:
    families = {
        "count": GaugeMetricFamily(
            "flashsale_processes", "Processes that report.", labels=["role"]
        ),
        "memory": GaugeMetricFamily(
            "flashsale_process_resident_memory_bytes",
            "Memory by role.",
            labels=["role"],
        ),
        "files": GaugeMetricFamily(
            "flashsale_process_open_fds", "Open files by role.", labels=["role"]
        ),
    }
    cpu = CounterMetricFamily("flashsale_process_cpu_seconds", "CPU time by role.", labels=["role"])
    sums: dict[str, dict[str, float]] = {}
    for name, state in processes.items():
        of_role = sums.setdefault(name.partition(":")[0], dict.fromkeys(families, 0))
        for figure in families:
            of_role[figure] += state.get(figure, figure == "count")
    for role, figures in sums.items():
        for figure, value in figures.items():
            families[figure].add_metric([role], value)
    for field, seconds in counted.items():
        if field.startswith("cpu:"):
            cpu.add_metric([field.partition(":")[2]], float(seconds))
    yield from (*families.values(), cpu)


# One row for each product, and one entry of an index.
HOLDS = """
SELECT (SELECT coalesce(sum(held_units), 0) FROM product_totals)::bigint,
       greatest(0, extract(epoch FROM clock_timestamp()
                - (SELECT min(held_until) FROM orders WHERE status = 'HELD')))::float,
       extract(epoch FROM clock_timestamp())
"""


def _of_postgres() -> Iterator[Metric]:
    # A partial index holds the open ones only, so this costs the same after any number of orders.
    letters = "SELECT count(*) FROM dead_letters WHERE resolution IS NULL"
    yield _gauge(
        "flashsale_dead_letters", "Orders that wait for a person.", db.session.scalar(text(letters))
    )
    units, overdue, now = db.session.execute(text(HOLDS)).one()
    yield _gauge("flashsale_held_units", "Units of stored orders that wait for payment.", units)
    yield _gauge("flashsale_hold_end_age_seconds", "How long the next end is overdue.", overdue)
    with contextlib.suppress(Unavailable):
        yield _gauge(
            "flashsale_clock_difference_seconds",
            "By how much the clocks of Redis and PostgreSQL differ at most.",
            max(abs(clock.timestamp() - float(now)) for clock in stock.clocks()),
        )
    feed = db.session.execute(FEED).one()
    yield CounterMetricFamily("flashsale_feed_events", "Events numbered so far.", value=feed.head)
    yield _gauge(
        "flashsale_feed_unnumbered_age_seconds",
        "Age of the oldest event that nobody has numbered.",
        float(feed.unnumbered),
    )
    endpoints = GaugeMetricFamily(
        "flashsale_webhook_endpoints", "Endpoints of webhooks by state.", labels=["state"]
    )
    for state in ("on", "failing", "off", "failed"):
        endpoints.add_metric([state], getattr(feed, state))
    yield endpoints
    yield _gauge(
        "flashsale_webhook_behind_events",
        "Events that the endpoint furthest behind has not had, of those that are switched on.",
        feed.behind,
    )
    yield _gauge(
        "flashsale_webhook_failing_seconds",
        "For how long the endpoint that fails longest has taken nothing.",
        float(feed.failing_seconds),
    )
