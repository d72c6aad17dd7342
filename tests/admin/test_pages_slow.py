"""The pages while a server answers each question, but late: their waits have one bound together."""

import subprocess
import sys
import time
from contextlib import contextmanager
from urllib.parse import quote

import pytest
from people import sign_in_once
from waiting import wait_until

from app import create_app, database
from app.breaker import Breaker
from app.config import ROOT
from app.extensions import stock
from app.watch.telemetry import Meter
from app.web import polls

# Of each question, half of it each way; and what a page may wait, which is less than two of them.
TRIP_SECONDS, PAGE_SECONDS = 0.3, 0.5


class Slow:
    """A proxy to a server's socket that can make it slow."""

    def __init__(self, listen, target) -> None:
        command = [sys.executable, ROOT / "stress" / "fault_proxy.py", listen, target]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, text=True)
        wait_until(listen.exists, 10, "the proxy")

    def delay(self, seconds: float) -> None:
        self._process.stdin.write(f"delay {seconds}\n")
        self._process.stdin.flush()

    def stop(self) -> None:
        self._process.stdin.close()
        self._process.terminate()
        self._process.wait()


@pytest.fixture
def redis_proxy(servers, tmp_path):
    proxy = Slow(tmp_path / "redis.sock", servers[0].socket)
    yield proxy
    proxy.stop()


@pytest.fixture
def postgres_proxy(servers, tmp_path):
    proxy = Slow(tmp_path / servers[1].socket_name, servers[1].socket)
    yield proxy
    proxy.stop()


@pytest.fixture
def browser(redis_proxy, postgres_proxy, make_app, settings, tmp_path, monkeypatch):
    """A browser of an admin; each of the two servers can be made slow."""
    # Nobody asks but the page.
    monkeypatch.setattr(Meter, "flush", lambda self: None)
    app = make_app(
        redis_url=f"unix://{tmp_path}/redis.sock",
        database_url=settings.database_url.partition("?")[0] + f"?host={quote(str(tmp_path))}",
    )
    browser = app.test_client()
    sign_in_once(app, browser, "admin")
    yield browser
    database._breaker.answered()
    # The limits of the other routes are the newest app's, for all apps of this process.
    create_app(settings)


@pytest.fixture
def waits(monkeypatch):
    """Return the seconds of each wait for a server that took as long as a trip."""
    waiting, waits = Breaker.waiting, []

    @contextmanager
    def timed(breaker):
        started = time.monotonic()
        with waiting(breaker):
            yield
        if time.monotonic() - started >= TRIP_SECONDS:
            waits.append(breaker)

    monkeypatch.setattr(Breaker, "waiting", timed)
    return waits


@pytest.mark.parametrize("path", ["/admin/", "/admin/live", "/admin/products/1"])
def test_a_slow_redis_is_unknown_once_a_page_has_waited_for_it(
    browser, redis_proxy, waits, monkeypatch, path
):
    assert "<b data-free>100</b>" in browser.get(path).text
    monkeypatch.setattr(stock.first.server.breaker, "_request_seconds", PAGE_SECONDS)
    browser.application.extensions["polls"] = polls.Polls()
    redis_proxy.delay(TRIP_SECONDS / 2)
    waits.clear()
    answer = browser.get(path)
    assert answer.status_code == 200
    assert "<b data-free>–</b>" in answer.text
    assert len(waits) <= 2, "one, and one that was cut"


@pytest.mark.parametrize("path", ["/admin/", "/admin/products/1", "/admin/orders/"])
def test_a_slow_postgres_is_asked_for_so_long(browser, postgres_proxy, waits, monkeypatch, path):
    assert browser.get(path).status_code == 200
    browser.application.extensions["polls"] = polls.Polls()
    monkeypatch.setattr(database._breaker, "_request_seconds", PAGE_SECONDS)
    postgres_proxy.delay(TRIP_SECONDS / 2)
    waits.clear()
    answer = browser.get(path)
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
    assert len(waits) <= 2


def test_the_next_page_waits_anew(browser, redis_proxy, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(stock.first.server.breaker, "_request_seconds", PAGE_SECONDS)
        redis_proxy.delay(TRIP_SECONDS / 2)
        assert "<b data-free>–</b>" in browser.get("/admin/products/1").text
        redis_proxy.delay(0)
    wait_until(lambda: "<b data-free>100</b>" in browser.get("/admin/products/1").text, 5)
