"""/metrics: the right figures, from any process, guarded, in bounded number."""

import json
import time
import timeit
from datetime import UTC, datetime, timedelta

import pytest
import redis
from call import call
from counts import commandstats
from prometheus_client.parser import text_string_to_metric_families
from waiting import patience, wait_until

from app.audit import CLI
from app.extensions import db, stock
from app.problems import Unavailable
from app.products import catalogue, terms
from app.stock import figures
from app.stock.keys import KEYS
from app.stock.link import Question
from app.stock.shard import Shard
from app.watch import telemetry
from app.watch.telemetry import DURATION_BOUNDS, Meter


def read(client, headers) -> dict:
    """Return {(name, labels as a sorted tuple): value}."""
    answer = client.get("/metrics", headers=headers)
    assert answer.status_code == 200
    assert answer.mimetype == "text/plain"
    return parse(answer.text)


def parse(text) -> dict:
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = (sample.name, tuple(sorted(sample.labels.items())))
            assert key not in found, f"{key} is there twice"
            found[key] = sample.value
    return found


def value(figures, name, **labels):
    return figures[name, tuple(sorted(labels.items()))]


def test_outcomes_by_product_and_kind(app, client, buy, drain, admin_headers):
    for user in (1, 2, 2):
        buy(user)
    buy(3, quantity=101)
    buy(4, quantity=10**5)
    buy(5, product_id=77)
    buy(6, key="a")
    buy(6, key="a")
    drain()
    buy(7, quantity=10)
    figures = read(client, admin_headers)
    for outcome, count in {"accepted": 5, "too_many": 2, "replayed": 1}.items():
        assert value(figures, "flashsale_purchases_total", product="1", outcome=outcome) == count
    assert value(figures, "flashsale_purchases_total", product="none", outcome="unknown") == 1
    assert value(figures, "flashsale_orders_persisted_total", product="1") == 4
    assert value(figures, "flashsale_units_claimed_total", product="1") == 14
    assert value(figures, "flashsale_stock_units", product="1") == 86
    assert value(figures, "flashsale_orders_waiting") == 1
    assert 0 <= value(figures, "flashsale_oldest_order_age_seconds") < 10
    assert value(figures, "flashsale_dead_letters") == 0
    assert value(figures, "flashsale_sale_prepared") == 1
    assert value(figures, "flashsale_redis_durable") == 1
    assert {value(figures, "flashsale_up", server=name) for name in ("redis", "postgres")} == {1}


def test_durations_of_several_processes_are_one_histogram(app, client, buy, admin_headers):
    # Statuses of their own: the app's meter may still report what an earlier test did.
    one, other = Meter("web"), Meter("web")
    for meter, seconds, times in ((one, 0.0015, 3), (one, 0.03, 1), (other, 0.0015, 2)):
        for _ in range(times):
            meter.observe("298 Test", seconds)
    other.observe("299 Test", 9.0)
    for meter in (one, other, one):
        meter.flush()
    buckets = "flashsale_purchase_duration_seconds_bucket"
    figures = read(client, admin_headers)
    at = [value(figures, buckets, status="298", le=str(bound)) for bound in DURATION_BOUNDS]
    assert at[:3] == [0, 0, 5]
    assert at[-1] == 6
    assert at == sorted(at)
    total = "flashsale_purchase_duration_seconds"
    assert value(figures, f"{total}_count", status="298") == 6
    assert value(figures, f"{total}_sum", status="298") == pytest.approx(0.0375)
    assert value(figures, buckets, status="299", le="5.0") == 0
    assert value(figures, buckets, status="299", le="+Inf") == 1


def test_a_bound_belongs_to_its_bucket(app, client, admin_headers):
    meter = Meter("web")
    meter.observe("298 Test", DURATION_BOUNDS[3])
    meter.flush()
    figures = read(client, admin_headers)
    bucket = "flashsale_purchase_duration_seconds_bucket"
    assert value(figures, bucket, status="298", le=str(DURATION_BOUNDS[3])) == 1


def test_what_was_counted_while_redis_was_away_is_not_lost(app, client, admin_headers, monkeypatch):
    meter = Meter("web")
    meter.observe("297 Test", 0.1)
    with monkeypatch.context() as broken:
        broken.setattr(stock.board, "client", redis.Redis.from_url("redis://127.0.0.1:1"))
        with pytest.raises(Unavailable):
            meter.flush()
    meter.flush()
    meter.flush()
    figures = read(client, admin_headers)
    assert value(figures, "flashsale_purchase_duration_seconds_count", status="297") == 1


def test_counting_costs_next_to_nothing():
    meter = Meter("web")
    meter._thread = True  # nothing to report to
    times = timeit.repeat(
        lambda: meter.observe("200 OK", 0.0013), time.thread_time, number=10_000, repeat=5
    )
    assert min(times) / 10_000 < patience(5e-6)


def test_processes_and_workers(app, client, admin_headers):
    for meter in (Meter("web"), Meter("worker")):
        meter.flush()
    stock.client.hset(KEYS.processes, "web:gone:1", json.dumps({"at": time.time() - 60}))
    stock.client.zadd(KEYS.workers, {"one": time.time(), "gone": time.time() - 60})
    figures = read(client, admin_headers)
    for role in ("web", "worker"):
        assert value(figures, "flashsale_processes", role=role) == 1
        assert value(figures, "flashsale_process_resident_memory_bytes", role=role) > 10**7
        assert value(figures, "flashsale_process_open_fds", role=role) > 3
        assert value(figures, "flashsale_process_cpu_seconds_total", role=role) > 0
    assert value(figures, "flashsale_workers") == 1
    assert not stock.client.hexists(KEYS.processes, "web:gone:1")


def test_batches(app, client, admin_headers):
    for orders in (1, 2, 3, 2000):
        telemetry.count_batch(orders)
    figures = read(client, admin_headers)
    assert value(figures, "flashsale_batch_orders_sum") == 2006
    for bound, count in {"1": 1, "2": 2, "5": 3, "1000": 3, "2000": 4, "+Inf": 4}.items():
        assert value(figures, "flashsale_batch_orders_bucket", le=bound) == count


def test_the_ledger(app, client, admin_headers):
    assert ("flashsale_ledger_ok", ()) not in read(client, admin_headers)
    for ok in (True, False):
        stock.client.set(KEYS.ledger, json.dumps({"at": 1795343988.5, "ok": ok, "products": {}}))
        figures = read(client, admin_headers)
        assert value(figures, "flashsale_ledger_ok") == ok
        assert value(figures, "flashsale_ledger_checked_timestamp_seconds") == 1795343988.5


def test_every_shard_s_clock_is_compared(make_app, admin_headers, monkeypatch):
    """It gives the holds of its shoppers their end; that of the Redis of jobs gives none."""
    app = make_app(shards=2)

    def difference() -> float:
        return value(read(app.test_client(), admin_headers), "flashsale_clock_difference_seconds")

    assert difference() < patience(1)
    ask = Shard.asking_clock
    fast = Question([("TIME",)], lambda _: datetime.now(UTC) + timedelta(hours=1))
    monkeypatch.setattr(Shard, "asking_clock", lambda of: fast if of.part.shard else ask(of))
    assert difference() > 3000


def test_the_number_of_series_is_bounded(app, client, admin_headers, monkeypatch):
    monkeypatch.setattr(telemetry, "MOST_PRODUCTS", 3)
    with app.app_context():
        for _ in range(6):
            data = {"name": "Lamp", "priceCents": 1, "currency": "USD", "stock": 5}
            catalogue.create(terms.read_new(data), CLI)
    figures = read(client, admin_headers)
    of_products = [dict(labels) for _, labels in figures if "product" in dict(labels)]
    assert {labels["product"] for labels in of_products} == {"1", "2", "3", "other"}
    assert len(of_products) == 4 * 4
    assert value(figures, "flashsale_stock_units", product="other") == 20


def test_many_products_cost_little(app, client, admin_headers, monkeypatch):
    """Those that are not told apart are added up by Redis, a few in each of its turns."""
    monkeypatch.setattr(telemetry, "MOST_PRODUCTS", 3)
    monkeypatch.setattr(figures, "MOST_AT_ONCE", 4)

    def add(products):
        rows = [{"name": "Lamp", "priceCents": 1, "currency": "USD", "stock": 5}] * products
        with app.app_context():
            ids = [of.id for of in catalogue.add([*map(terms.read_new, rows)], CLI, "more")]
            db.session.commit()
            catalogue.put_on_sale(ids)

    def cost():
        before, sent = commandstats(), stock.client.info("stats")["total_net_output_bytes"]
        told = read(client, admin_headers)
        after, sent_then = commandstats(), stock.client.info("stats")["total_net_output_bytes"]
        scripts, hashes = (after[of] - before.get(of, 0) for of in ("evalsha", "hgetall"))
        return told, scripts, hashes, sent_then - sent

    add(6)
    _, few_scripts, few_hashes, few_bytes = cost()
    add(80)
    told, scripts, hashes, sent = cost()
    assert value(told, "flashsale_stock_units", product="other") == (6 + 80 - 2) * 5
    assert (hashes - few_hashes, scripts - few_scripts) == (80, 80 / 4)
    # A product by itself is some 250 bytes; what is told of 80 is their ids and the 20 sums.
    assert sent - few_bytes < 80 * 15 + 20 * 450


@pytest.mark.parametrize(
    "headers", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer é"}]
)
def test_the_token(app, client, headers):
    answer = client.get("/metrics", headers=headers)
    assert (answer.status_code, answer.json["code"]) == (401, "unauthorized")
    assert answer.headers["WWW-Authenticate"].startswith("Bearer")
    assert "flashsale" not in answer.text


def test_a_token_of_its_own(make_app, admin_headers):
    client = make_app(metrics_token="only for the figures").test_client()
    assert client.get("/metrics", headers=admin_headers).status_code == 401
    headers = {"Authorization": "Bearer only for the figures"}
    assert read(client, headers)
    assert client.post("/products/restock", headers=headers).status_code == 401


def test_servers_that_are_down(app, client, admin_headers, monkeypatch):
    monkeypatch.setattr(stock.first, "client", redis.Redis.from_url("redis://127.0.0.1:1"))
    figures = read(client, admin_headers)
    assert value(figures, "flashsale_up", server="redis") == 0
    assert value(figures, "flashsale_up", server="postgres") == 1
    assert value(figures, "flashsale_dead_letters") == 0


def test_the_running_system(server):
    """The lane's own durations arrive, whichever process served; and what the worker is."""
    bearer = {"Authorization": f"Bearer {server.api_token}"}
    refused = ("flashsale_purchase_duration_seconds_count", (("status", "404"),))

    def figures():
        return parse(call(f"{server.url}/metrics", headers=bearer).body.decode())

    before = figures().get(refused, 0)
    for user in range(20):
        body = {"userId": 8_000_000_001 + user, "productId": 9_000_000_000}
        assert call(f"{server.url}/purchase", body).status == 404
    wait_until(lambda: figures().get(refused, 0) - before >= 20)
    seen = figures()
    assert seen[refused] - before == 20
    assert value(seen, "flashsale_workers") >= 1
    assert value(seen, "flashsale_processes", role="worker") >= 1
