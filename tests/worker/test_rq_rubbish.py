"""An RQ whose keys hold rubbish, under a real worker process: orders are stored all the same."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
import redis
from sqlalchemy import text
from waiting import patience, wait_until

from app.books import ledger
from app.config import ROOT
from app.extensions import db, stock
from app.stock.keys import KEYS

STORED_WITHIN_SECONDS = 5
QUEUE = "rq:queue:orders"
REGISTRIES = ("wip", "finished", "failed", "deferred", "scheduled", "canceled", "ready")
NO_TEXT = b"\xff\xfe\x80"
GOOD_JOB = {
    "data": json.dumps(["app.worker.jobs.persist_orders", None, [], {}]),
    "created_at": "2026-11-22T10:15:28.391000Z",
    "origin": "orders",
    "status": "queued",
    "timeout": "30",
}


def a_job(client: redis.Redis, name: str, **fields: str | bytes | None) -> None:
    """Queue a job that differs from a good one in some fields; None leaves one out."""
    mapping = {key: value for key, value in (GOOD_JOB | fields).items() if value is not None}
    client.hset(f"rq:job:{name}", mapping=mapping)
    client.lpush(QUEUE, name)


def no_such_function(client: redis.Redis) -> None:
    a_job(client, "a", data=json.dumps(["app.worker.jobs.no_such_function", None, [], {}]))
    a_job(client, "b", data=json.dumps(["no.such.module", None, [], {}]))
    a_job(
        client, "c", data=json.dumps(["app.worker.jobs.persist_orders", None, ["one", "two"], {}])
    )


def broken_data(client: redis.Redis) -> None:
    a_job(client, "a", data="{not json")
    a_job(client, "b", data=NO_TEXT)
    a_job(client, "c", data="[1]")
    a_job(client, "d", data=None)


def missing_fields(client: redis.Redis) -> None:
    a_job(client, "a", created_at=None, origin=None, status=None, timeout=None)


def broken_fields(client: redis.Redis) -> None:
    a_job(client, "a", created_at="yesterday")
    a_job(client, "b", status="no such status")
    a_job(client, "c", timeout="soon")
    a_job(client, "d", origin=NO_TEXT, description=NO_TEXT, worker_name=NO_TEXT)


def jobs_of_another_type(client: redis.Redis) -> None:
    client.set("rq:job:a", "not a hash")
    client.lpush(QUEUE, "a", NO_TEXT, "")


def ids_without_a_job(client: redis.Redis) -> None:
    client.rpush(QUEUE, *(f"gone-{number}" for number in range(3000)))


def a_job_that_hangs(client: redis.Redis) -> None:
    a_job(client, "a", data=json.dumps(["time.sleep", None, [20], {}]))


def registries_full_of_nothing(client: redis.Redis) -> None:
    """Ids that lead nowhere, past and to come, and what is no id at all."""
    now = time.time()
    for registry in REGISTRIES:
        for number, score in enumerate((0, -1, now - 60, now + 60, 1e300, "+inf", "-inf")):
            names = {f"gone-{number}-{i}:e": score for i in range(1000)}
            client.zadd(f"rq:{registry}:orders", names | {NO_TEXT + b"%d" % number: score})
    client.rpush(f"{QUEUE}:intermediate", *(f"gone-{number}" for number in range(1000)))


def registries_of_another_type(client: redis.Redis) -> None:
    for registry in REGISTRIES:
        client.set(f"rq:{registry}:orders", "not a sorted set")
    client.set(f"{QUEUE}:intermediate", "not a list")


def workers_that_are_none(client: redis.Redis) -> None:
    for key in ("rq:workers", "rq:workers:orders"):
        client.sadd(key, "rq:worker:gone", "", "no key", NO_TEXT)
    client.hset("rq:worker:gone", mapping={"birth": "yesterday", "queues": NO_TEXT})


def workers_of_another_type(client: redis.Redis) -> None:
    for key in ("rq:workers", "rq:workers:orders", "rq:queues"):
        client.set(key, "not a set")


def all_workers_suspended(client: redis.Redis) -> None:
    client.set("rq:suspended", 1)


RUBBISH = [
    no_such_function,
    broken_data,
    missing_fields,
    broken_fields,
    jobs_of_another_type,
    ids_without_a_job,
    a_job_that_hangs,
    registries_full_of_nothing,
    registries_of_another_type,
    workers_that_are_none,
    workers_of_another_type,
    all_workers_suspended,
]


@pytest.fixture
def start_worker(app, settings, tmp_path):
    """Start `worker.py` as the supervisor does, on the servers of the tests."""
    started = []
    log = tmp_path / "worker.log"

    def start() -> subprocess.Popen:
        environ = os.environ | {
            "REDIS_URL": settings.redis_url,
            "DATABASE_URL": settings.database_url,
            "SECRET_KEY": settings.secret_key,
            "DATA_DIR": str(settings.data_dir),
        }
        with log.open("w") as output:
            worker = subprocess.Popen(
                [sys.executable, "worker.py"], cwd=ROOT, env=environ, stdout=output, stderr=output
            )
        started.append(worker)
        wait_until(lambda: stock.client.zcard(KEYS.workers), 15, "the worker to be there")
        return worker

    yield start
    for worker in started:
        worker.kill()
        worker.wait()
    # Shown with a test that fails.
    print(log.read_text()[-5000:])


def claim(first: int) -> None:
    for user in range(first, first + 5):
        assert stock.claim(user, 1, 1, None, "a").outcome == b"accepted"


def stored() -> int:
    found = db.session.scalar(text("SELECT count(*) FROM orders"))
    db.session.rollback()
    return found


def stored_by_jobs() -> int:
    """Return how many orders were stored by RQ's jobs, and not by the relay in their stead."""
    found = db.session.scalar(text("SELECT sum(orders) FROM batches WHERE job_id <> ''"))
    db.session.rollback()
    return found or 0


@pytest.mark.drill
@pytest.mark.parametrize("rubbish", RUBBISH, ids=lambda rubbish: rubbish.__name__)
def test_orders_are_stored_in_spite_of(app, start_worker, rubbish: Callable):
    with app.app_context():
        rubbish(stock.raw_client)
        claim(1)
        worker = start_worker()
        wait_until(lambda: stored() == 5, STORED_WITHIN_SECONDS, "the orders to be stored")
        assert worker.poll() is None
        assert ledger.check(rows=True).ok


@pytest.mark.drill
def test_a_worker_goes_on_when_the_rubbish_is_gone(app, start_worker):
    with app.app_context():
        client = stock.raw_client
        worker = start_worker()
        claim(1)
        wait_until(lambda: stored_by_jobs() == 5, STORED_WITHIN_SECONDS, "a job to store them")
        client.delete(*client.keys("rq:*"))
        for rubbish in (workers_of_another_type, jobs_of_another_type, registries_of_another_type):
            rubbish(client)
        claim(10)
        wait_until(lambda: stored() == 10, STORED_WITHIN_SECONDS, "the orders to be stored")
        before = stored_by_jobs()
        client.delete(*client.keys("rq:*"))
        claim(20)
        wait_until(lambda: stored() == 15, STORED_WITHIN_SECONDS, "the orders to be stored")
        claim(30)
        wait_until(lambda: stored_by_jobs() > before, STORED_WITHIN_SECONDS, "a job to store them")
        assert worker.poll() is None
        wait_until(lambda: stored() == 20, STORED_WITHIN_SECONDS, "all orders to be stored")
        assert ledger.check(rows=True).ok


@pytest.mark.drill
def test_a_worker_among_rubbish_ends_when_it_is_asked_to(app, start_worker, tmp_path):
    with app.app_context():
        workers_of_another_type(stock.raw_client)
        worker = start_worker()
        log = tmp_path / "worker.log"
        wait_until(lambda: "RQ's worker ended" in log.read_text(), 5, "RQ to stumble")
        worker.terminate()
        assert worker.wait(patience(5)) == 0
