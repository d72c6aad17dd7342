"""A Redis of its own for what is no part of the sale: RQ, the other routes' limits, sessions."""

import threading

import pytest
import redis
from people import create_person, sign_in
from waiting import wait_until

from app import create_app
from app.config import SettingsError, load_settings, with_secrets
from app.extensions import stock
from app.run.embedded import RedisServer
from app.worker import jobs, relay


@pytest.fixture
def jobs_server(tmp_path):
    server = RedisServer(tmp_path)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def app(jobs_server, make_app, settings):
    yield make_app(jobs_redis_url=jobs_server.url)
    create_app(settings)


def test_each_has_its_own(app, jobs_server, client, buy):
    assert buy(1).status_code == 200
    assert client.get("/purchase/orders/1").status_code == 200
    assert sign_in(client, create_person(app, "admin")).status_code == 302
    assert client.get("/admin/").status_code == 200
    with app.app_context():
        assert jobs.enqueue_drain()
    theirs = {key.split(b":")[0] for key in redis.Redis.from_url(jobs_server.url).scan_iter()}
    assert {b"rq", b"staff"} <= theirs
    assert b"sale" not in theirs
    assert {key.split(":")[0] for key in stock.client.scan_iter()} == {"sale"}


def test_without_it_the_sale_goes_on_and_orders_are_stored(app, jobs_server, client, buy):
    jobs_server.stop()
    assert buy(1, key="k").status_code == 200
    assert buy(1, key="k").headers["Idempotent-Replayed"] == "true"
    assert client.get("/purchase/orders/1").status_code == 503
    ready = client.get("/readyz")
    assert ready.status_code == 503
    assert ready.json["checks"]["jobs"] == {"ok": False, "state": "unreachable"}
    stopped, works = threading.Event(), relay.Relay()
    worker = threading.Thread(target=relay.run_forever, args=(app, works.run_once, stopped))
    worker.start()
    try:
        wait_until(lambda: not stock.waiting(), 20, "the relay to store the order")
    finally:
        stopped.set()
        worker.join()
    # One that is down closes no line to the other.
    assert buy(2).status_code == 200
    assert client.get("/healthz").status_code == 200
    jobs_server.start()
    wait_until(lambda: client.get("/purchase/orders/1").status_code == 200, 10, "look-ups")


def test_a_cluster_needs_one():
    given = {"REDIS_URL": "redis+cluster://a,b", "SECRET_KEY": "s" * 32}
    with pytest.raises(SettingsError, match="JOBS_REDIS_URL"):
        with_secrets(load_settings(given))
    with pytest.raises(SettingsError, match="JOBS_REDIS_URL"):
        load_settings(given | {"JOBS_REDIS_URL": "redis+cluster://a"})
