"""The pages while Redis hangs: each asks once in vain, and is shown with what else is known."""

import os
import signal

import pytest

from app import breaker as breakers
from app.extensions import stock
from app.watch.telemetry import Meter


@pytest.fixture
def hang(servers):
    """Stop Redis in the middle of whatever it does; it goes on when the test is over."""
    process = servers[0].process

    def stop():
        os.kill(process.pid, signal.SIGSTOP)

    yield stop
    os.kill(process.pid, signal.SIGCONT)
    stock.first.server.breaker.answered()


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/admin/", 200),
        ("/admin/live", 200),
        ("/admin/products/1", 200),
        ("/admin/products/", 200),
        ("/admin/orders/", 200),
        ("/admin/rq/", 503),
        ("/readyz", 503),
    ],
)
def test_a_page_waits_once(admin, hang, monkeypatch, path, status):
    # Nobody asks but the page: a process that has answered purchases reports its figures, too.
    monkeypatch.setattr(Meter, "flush", lambda self: None)
    # What is not asked for the first time: templates, sessions, connections.
    admin.get(path)
    # Whoever asks again does so in spite of the breaker, not because this machine is slow.
    monkeypatch.setattr(breakers, "RETRY_AFTER_FAILURE_SECONDS", 3600)
    breaker, waits = stock.first.server.breaker, []
    breaker.answered()
    wait_in_vain = breaker.waited_in_vain
    monkeypatch.setattr(breaker, "waited_in_vain", lambda: waits.append(path) or wait_in_vain())
    hang()
    assert admin.get(path).status_code == status
    assert waits == [path]
