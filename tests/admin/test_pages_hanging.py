"""The pages while Redis hangs: each asks once in vain, and is shown with what else is known."""

import os
import signal

import limits
import pytest
from people import PASSWORD, create_person, csrf_token, sign_in
from waiting import wait_until

from app import breaker as breakers
from app.extensions import stock
from app.staff import guesses
from app.watch.telemetry import Meter


@pytest.fixture
def hang(servers, monkeypatch):
    """Stop Redis in the middle of whatever it does; it goes on when the test is over."""
    process = servers[0].process
    # Nobody asks but the page: a process that has answered purchases reports its figures, too.
    monkeypatch.setattr(Meter, "flush", lambda self: None)

    def stop():
        stock.first.server.breaker.answered()
        os.kill(process.pid, signal.SIGSTOP)

    yield stop
    go_on(process)


def go_on(process):
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
    # What is not asked for the first time: templates, sessions, connections.
    admin.get(path)
    # Whoever asks again does so in spite of the breaker, not because this machine is slow.
    monkeypatch.setattr(breakers, "RETRY_AFTER_FAILURE_SECONDS", 3600)
    breaker, waits = stock.first.server.breaker, []
    wait_in_vain = breaker.waited_in_vain
    monkeypatch.setattr(breaker, "waited_in_vain", lambda: waits.append(path) or wait_in_vain())
    hang()
    assert admin.get(path).status_code == status
    assert waits == [path]


def test_a_password_that_nobody_could_look_at_does_not_count(app, servers, hang, monkeypatch):
    """What Redis was sent while it hung, it does when it goes on."""
    monkeypatch.setattr(guesses, "PERSON_LIMIT", limits.parse("1/15 minutes"))
    create_person(app, "admin")
    browser = app.test_client()
    # The limiter's own connections may have been left by a test before this one, for a moment.
    wait_until(lambda: sign_in(browser).status_code == 302)
    browser.post("/admin/sign-out", data={"csrf_token": csrf_token(browser)})
    token = csrf_token(browser, "/admin/sign-in")
    right = {"email": "admin-page@example.com", "password": PASSWORD}
    hang()
    assert browser.post("/admin/sign-in", data=right | {"csrf_token": token}).status_code == 503
    go_on(servers[0].process)
    wait_until(lambda: sign_in(browser).status_code == 302)
