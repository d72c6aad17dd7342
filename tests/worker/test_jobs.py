"""What RQ runs."""

import psycopg2
import pytest
from sqlalchemy.exc import OperationalError

from app.extensions import stock
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
