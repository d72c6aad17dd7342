"""What can happen to a worker: hung, doubled, killed, an RQ full of rubbish; orders get stored."""

import contextlib
import logging
import os
import signal
import threading
import time

import psutil
import psycopg2
import pytest
import redis
from sqlalchemy import text
from system import UNLIMITED, start_system, stop_system
from waiting import patience, wait_until

from app.books import ledger
from app.config import NO_LIMIT
from app.extensions import db, stock
from app.orders.drain import BATCH_ORDERS, drain_batch
from app.problems import Unavailable
from app.stock.keys import KEYS
from app.worker import jobs, relay

STORED_WITHIN_SECONDS = 5


def claim(first: int, count: int = 1) -> None:
    for user in range(first, first + count):
        assert stock.claim(user, 1, 1, None, "a").outcome == b"accepted"


def stored() -> int:
    count = db.session.scalar(text("SELECT count(*) FROM orders"))
    db.session.rollback()
    return count


def test_two_drains_at_once_store_each_order_once(app):
    results = []
    with app.app_context():
        claim(1, 100)

    def drain():
        with app.app_context():
            while stock.waiting():
                results.append(drain_batch("test", "test", most=7))

    threads = [threading.Thread(target=drain) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(drained.persisted for drained in results) == 100
    with app.app_context():
        assert stored() == 100
        assert ledger.check(rows=True).ok


def test_a_drain_that_hangs_in_its_transaction_is_thrown_out(app, monkeypatch):
    """Its lock goes with it, and when it wakes it can do no harm."""
    with app.app_context():
        claim(1, 3)
        sleeping = threading.Event()
        awake = threading.Event()
        real = stock.first.read_outbox

        def hang(count, after=None):
            if not sleeping.is_set():
                sleeping.set()
                awake.wait(20)
            return real(count, after)

        monkeypatch.setattr(stock.first, "read_outbox", hang)

        def drain():
            # It may find nothing to do any more, or its connection gone.
            with app.app_context(), contextlib.suppress(psycopg2.Error):
                drain_batch("hung", "hung")

        thread = threading.Thread(target=drain)
        thread.start()
        sleeping.wait()
        assert drain_batch("next", "next").busy
        started = time.monotonic()
        wait_until(lambda: drain_batch("next", "next").persisted == 3, STORED_WITHIN_SECONDS)
        assert time.monotonic() - started < patience(STORED_WITHIN_SECONDS)
        awake.set()
        thread.join()
        assert stored() == 3
        assert ledger.check(rows=True).ok


def test_a_late_settle_takes_nothing(app, monkeypatch):
    """A worker stopped between COMMIT and trim wakes up after another one has done its work."""
    with app.app_context():
        claim(1, 3)
        kept = []
        real = stock.first.settle
        with monkeypatch.context() as patch:
            patch.setattr(stock.first, "settle", lambda *arguments: kept.append(arguments))
            drain_batch("slow", "slow")
        assert drain_batch("next", "next").duplicates == 3
        claim(10, 2)
        assert real(*kept[0]) is False
        assert stock.waiting() == 2
        assert ledger.check(rows=True).ok


def test_a_poisoned_batch_costs_only_its_poison(app):
    with app.app_context():
        claim(1, 50)
        for number, rubbish in enumerate(["", "x" * 5000, "1 2 3", "\0", "1 999 1 1 USD 1 ", "ü"]):
            stock.client.xadd(KEYS.outbox, {"order": rubbish}, id=f"{1000 + number}-0")
        stock.client.xadd(KEYS.outbox, {"other": "field"}, id="2000-0")
        stock.client.set(KEYS.order_ids, 2000)
        claim(100, 50)
        drained = drain_batch("test", "test")
        assert (drained.persisted, drained.dead_letters) == (100, 7)
        assert stock.waiting() == 0
        assert ledger.check(rows=True).ok


def test_a_queue_of_the_wrong_type(app):
    """RQ can't even take a job; the relay drains by itself. More rubbish: test_rq_rubbish.py."""
    with app.app_context():
        stock.raw_client.set("rq:queue:orders", b"not a list")
        claim(1, 5)
        stopped = threading.Event()
        step = relay.Relay()
        with pytest.raises(redis.ResponseError):
            jobs.enqueue_drain()
        wait_until(lambda: _survive(step, stopped) or stored() == 5, STORED_WITHIN_SECONDS + 1)
        stock.raw_client.delete("rq:queue:orders")
        assert ledger.check(rows=True).ok


@pytest.mark.drill
def test_a_backlog_that_no_job_stores_is_stored_at_one_go(make_app):
    """More than a batch: the relay does not wait anew for each one."""
    app = make_app(purchase_user_limit=NO_LIMIT, purchase_address_limit=NO_LIMIT)
    with app.app_context():
        stock.move(stock.generation(), 999, 1, 2 * BATCH_ORDERS)
        claim(1, 2 * BATCH_ORDERS + 1)
        stopped = threading.Event()
        step = relay.Relay()
        wait_until(lambda: step.run_once(stopped) or stored(), relay.STUCK_SECONDS + 2)
        # Each batch is a turn of its own, by which its worker shows that it gets on.
        assert stored() == BATCH_ORDERS
        for _ in range(2):
            step.run_once(stopped)
        assert stored() == 2 * BATCH_ORDERS + 1


def _survive(step, stopped) -> None:
    try:
        step.run_once(stopped)
    except redis.RedisError:
        time.sleep(0.05)


def test_an_outage_of_postgres_costs_memory_and_no_order(make_app):
    """Orders wait in the outbox; past the limit they are refused, and before that none is lost."""
    app = make_app(outbox_limit=1000, purchase_user_limit=NO_LIMIT, purchase_address_limit=NO_LIMIT)
    with app.app_context():
        stock.move(stock.generation(), 999, 1, 100_000)
        before = stock.client.info("memory")["used_memory"]
        claim(1, 1000)
        used = stock.client.info("memory")["used_memory"] - before
        assert used / 1000 < 1000
        refused = stock.claim(5000, 1, 1, None, "a")
        assert refused.outcome == b"overloaded"
        answer = app.test_client().post("/purchase", json={"userId": 5001, "productId": 1})
        assert answer.status_code == 503
        assert answer.headers["Retry-After"]
        assert drain_batch("test", "test").persisted == 1000
        assert stock.claim(5000, 1, 1, None, "a").outcome == b"accepted"


def test_a_disk_that_is_full_is_waited_for(app):
    """PostgreSQL's "no space left" is no fault of the order: nothing becomes a dead letter."""
    with app.app_context():
        db.session.execute(
            text(
                "CREATE FUNCTION full_disk() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
                " RAISE EXCEPTION 'could not extend file' USING ERRCODE = 'disk_full'; END $$;"
                "CREATE TRIGGER full_disk BEFORE INSERT ON orders"
                " FOR EACH STATEMENT EXECUTE FUNCTION full_disk()"
            )
        )
        db.session.commit()
        claim(1, 5)
        try:
            with pytest.raises(Exception, match="could not extend file"):
                drain_batch("test", "test")
        finally:
            db.session.execute(text("DROP TRIGGER full_disk ON orders; DROP FUNCTION full_disk"))
            db.session.commit()
        assert stock.waiting() == 5
        assert drain_batch("test", "test").persisted == 5
        assert ledger.check(rows=True).ok


def test_loops_outlive_every_failure(app, caplog):
    """A step may fail in any way: the next one is tried, and the log tells once."""
    stopped = threading.Event()
    errors = [Unavailable("x"), redis.ConnectionError("x"), ValueError("x"), MemoryError("x")]

    def step(_):
        if errors:
            raise errors.pop(0)
        stopped.set()

    with caplog.at_level(logging.CRITICAL):
        relay.run_forever(app, step, stopped)
    assert not errors


@pytest.mark.drill
def test_workers_killed_and_stopped_in_a_running_system(tmp_path_factory):
    """Each time the orders are stored within seconds of a healthy worker being there."""
    system = start_system(tmp_path_factory.mktemp("drain"), **UNLIMITED, WEB_WORKERS="1")
    try:
        import http.client
        import json
        from urllib.parse import urlsplit

        url = urlsplit(system.url)

        def call(method, path, body=None):
            connection = http.client.HTTPConnection(url.hostname, url.port, timeout=patience(10))
            connection.request(
                method, path, body and json.dumps(body), {"Content-Type": "application/json"}
            )
            answer = json.loads(connection.getresponse().read())
            connection.close()
            return answer

        def worker():
            for child in psutil.Process(system.process.pid).children():
                with contextlib.suppress(psutil.Error):
                    if child.cmdline()[1:2] == ["worker.py"]:
                        return child
            return None

        def processed(count):
            return lambda: call("GET", "/purchase/metrics")["total_processed"] >= count

        for round_ in range(1, 4):
            victim = wait_until(worker, 15, "a worker")
            body = {"userId": round_, "productId": 1}
            assert call("POST", "/purchase", body)["status"] == "queued"
            if round_ == 2:
                victim.send_signal(signal.SIGSTOP)
                time.sleep(0.2)
                assert call("POST", "/purchase", body | {"userId": 50})["status"] == "queued"
                os.kill(victim.pid, signal.SIGCONT)
                wait_until(processed(3), STORED_WITHIN_SECONDS, "the orders to be stored")
            else:
                victim.kill()
                wait_until(lambda gone=victim: not gone.is_running() or worker(), 5)
                wait_until(worker, 15, "the next worker")
                wait_until(processed(round_), STORED_WITHIN_SECONDS + 3, "the order to be stored")
        wait_until(processed(4), STORED_WITHIN_SECONDS, "all orders to be stored")
    finally:
        stop_system(system)
