"""What RQ runs."""

from functools import partial

import psycopg2
import pytest
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from app.extensions import db, stock
from app.feed import delivery
from app.locks import SHARD_DRAIN_LOCKS
from app.orders.drain import drain_batch
from app.problems import Unavailable
from app.stock.keys import KEYS
from app.worker import jobs


def test_a_job_tells_what_it_did_and_gives_the_lease_back(app, buy):
    buy(1)
    with app.app_context():
        assert jobs.enqueue_drain() is not None
        assert jobs.enqueue_drain() is None
        assert jobs.persist_orders() == "persisted 1 order"
        assert not stock.client.exists(KEYS.drain_lease)


@pytest.mark.parametrize(
    "error",
    [
        psycopg2.OperationalError("the database system is starting up\nDETAIL: …"),
        OperationalError("SELECT", {}, Exception("gone")),
        Unavailable("Redis did not answer"),
    ],
)
def test_an_outage_costs_a_job_every_two_seconds(app, monkeypatch, error):
    """No failed job with a stack trace five times a second: the lease is left to run out."""

    def fail(*_):
        raise error

    monkeypatch.setattr(jobs, "drain_batch", fail)
    with app.app_context():
        jobs.enqueue_drain()
        told = jobs.persist_orders()
        assert told.startswith("nothing stored, the orders wait: ")
        assert "\n" not in told
        assert 0 < stock.client.pttl(KEYS.drain_lease) <= jobs.LEASE_MS
        assert jobs.enqueue_drain() is None


def test_what_nobody_expected_fails_the_job(app, monkeypatch):
    def fail(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(jobs, "drain_batch", fail)
    with app.app_context(), pytest.raises(ZeroDivisionError):
        jobs.persist_orders()


def test_a_full_batch_calls_for_the_next(app, buy, monkeypatch):
    for user in (1, 2, 3):
        buy(user)
    monkeypatch.setattr(jobs, "drain_batch", partial(drain_batch, most=2))
    with app.app_context():
        queue = jobs.orders_queue()
        assert jobs.persist_orders() == "persisted 2 orders"
        assert queue.count == 1
        stock.board.end_drain_lease()
        assert jobs.persist_orders() == "persisted 1 order"
        assert (queue.count, stock.waiting()) == (1, 0)


def test_beside_another_drain_nothing_is_done_and_the_lease_stays(app, buy, connect):
    buy(1)
    another = connect()
    another.execute(f"SELECT pg_advisory_xact_lock({SHARD_DRAIN_LOCKS}, 0)")
    with app.app_context():
        jobs.enqueue_drain()
        assert jobs.persist_orders() == "another drain is at work"
        assert stock.client.exists(KEYS.drain_lease)
        assert stock.waiting() == 1
        another.connection.rollback()
        assert jobs.persist_orders() == "persisted 1 order"


def test_orders_of_another_sale_are_not_stored(app, buy):
    buy(1)
    with app.app_context():
        named = db.session.scalar(text("SELECT generation FROM sale"))
        for name, stored in (("another", "0 orders"), (named, "1 order")):
            db.session.execute(text("UPDATE sale SET generation = :name"), {"name": name})
            db.session.commit()
            told = jobs.persist_orders()
            assert (told, stock.waiting()) == (f"persisted {stored}", 1 - int(stored[0]))


def leased(name: object) -> int:
    return stock.client.pttl(f"{KEYS.webhook_lease_prefix}{name}")


def test_an_endpoint_has_one_turn_at_a_time_and_of_those_that_fail_one(app):
    with app.app_context():
        assert jobs.enqueue_webhook(1, failing=True)
        assert jobs.enqueue_webhook(1, failing=True) is None
        # Refused for the other's sake, it keeps no lease: it may be sent to when it is well again.
        assert jobs.enqueue_webhook(2, failing=True) is None
        assert leased(2) == -2
        assert jobs.enqueue_webhook(2, failing=False)
        # So long that all that stands before it in the queue may take its time.
        seconds = jobs.WEBHOOK_TURN_SECONDS + jobs.WEBHOOK_LEASE_SECONDS
        assert 1000 * (seconds - 5) < leased(2) <= 1000 * seconds
        assert jobs.webhooks_queue().count == 2


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (delivery.Busy(), "another process sends to webhook 1"),
        (psycopg2.OperationalError("gone\nDETAIL: …"), "it goes on later: gone"),
        (Unavailable("Redis did not answer"), "it goes on later: Redis did not answer"),
    ],
    ids=["busy", "PostgreSQL", "Redis"],
)
def test_a_turn_that_came_to_nothing_is_no_failed_job(app, monkeypatch, error, told):
    """Its lease runs out by itself: until then nobody tries again."""

    def fail(*_):
        raise error

    monkeypatch.setattr(delivery.Job, "run", fail)
    with app.app_context():
        jobs.enqueue_webhook(1, failing=True)
        assert jobs.send_webhooks(1, True) == told
        assert leased(1) > 0
        assert leased(jobs.FAILING) > 0


def test_a_turn_whose_time_was_up_is_followed_by_another(app, monkeypatch):
    def half(job):
        job.more = True
        return "half"

    monkeypatch.setattr(delivery.Job, "run", half)
    with app.app_context():
        jobs.enqueue_webhook(1, failing=True)
        assert jobs.send_webhooks(1, True) == "half"
        assert jobs.webhooks_queue().count == 2
        # By now it does not fail: those that do need not wait for it.
        assert leased(jobs.FAILING) == -2
        assert leased(1) > 0
