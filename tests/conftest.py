"""Real servers for every test: one Redis and one PostgreSQL for all, a clean sale for each."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import flask_migrate
import people
import pytest
import redis
from documented import DocumentedClient

from app import create_app
from app.audit import CLI
from app.books import recovery
from app.config import ROOT, Settings, load_settings
from app.extensions import db, stock
from app.orders.drain import drain_batch
from app.run.embedded import PostgresServer, RedisServer

sys.path.insert(0, str(ROOT / "stress"))

from client import sign_in

# Fixtures of the tests in a real browser.
pytest_plugins = ["browser"]

API_TOKEN = "test-token-0123456789"
ADMIN_PASSWORD = people.PASSWORD


def wait_until(condition: Callable[[], object], seconds: float = 15, what: str = "") -> object:
    """Return the condition's first true value; fail when the deadline passes without one."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > deadline:
            pytest.fail(f"waited {seconds} s for {what or condition}")
        time.sleep(0.01)
    return value


@pytest.fixture(scope="session")
def servers(tmp_path_factory) -> Iterator[tuple[RedisServer, PostgresServer]]:
    """The run's own Redis and PostgreSQL, on Unix sockets in a temporary directory."""
    folder = tmp_path_factory.mktemp("servers")
    started = (
        RedisServer(folder),
        # A test database need not survive a power cut; the reliability tests use their own.
        PostgresServer(folder, extra=("fsync=off",)),
    )
    for server in started:
        server.start()
    yield started
    for server in started:
        server.stop()


@pytest.fixture(scope="session")
def settings(servers, tmp_path_factory) -> Settings:
    redis_server, postgres_server = servers
    return replace(
        load_settings({}),
        redis_url=redis_server.url,
        database_url=postgres_server.url,
        data_dir=tmp_path_factory.mktemp("data"),
        secret_key="secret-key-of-the-tests",
        admin_password=ADMIN_PASSWORD,
        admin_api_token=API_TOKEN,
    )


@pytest.fixture(scope="session")
def built_app(settings):
    app = create_app(settings)
    app.test_client_class = DocumentedClient
    with app.app_context():
        flask_migrate.upgrade()
    return app


@pytest.fixture
def app(built_app):
    """The app with an empty shop but for product 1, which has 100 items."""
    _reset(built_app)
    yield built_app
    with built_app.app_context():
        db.session.remove()


@pytest.fixture
def make_app(built_app, settings):
    """Build an app with other settings on the same servers."""

    def make(**changes):
        app = create_app(replace(settings, **changes))
        app.test_client_class = DocumentedClient
        _reset(app)
        return app

    yield make
    stock.init_app(settings)


def _reset(app) -> None:
    with app.app_context():
        client = redis.Redis.from_url(app.config["SETTINGS"].redis_url)
        client.flushdb()
        client.close()
        recovery.reset(CLI)


@pytest.fixture
def client(app):
    return app.test_client()


@pytest.fixture
def runner(app):
    return app.test_cli_runner()


@pytest.fixture
def admin_headers() -> dict[str, str]:
    return {"Authorization": f"Bearer {API_TOKEN}"}


@pytest.fixture
def admin(app):
    """A browser in which an admin is signed in."""
    return _signed_in(app, "admin")


@pytest.fixture
def support(app):
    """A browser in which somebody of the support is signed in."""
    return _signed_in(app, "support")


def _signed_in(app, role: str):
    browser = app.test_client()
    people.sign_in_once(app, browser, role)
    return browser


@pytest.fixture
def drain(app) -> Callable[[], int]:
    """Persist everything that waits, as a worker's jobs would; return the number persisted."""

    def run() -> int:
        persisted = 0
        with app.app_context():
            while stock.waiting():
                persisted += drain_batch("test", "test").persisted
        return persisted

    return run


@pytest.fixture
def buy(client):
    """Buy as a user; return the response."""

    def post(user_id: int, product_id: int = 1, quantity: int = 1, key: str | None = None):
        headers = {"Idempotency-Key": key} if key is not None else {}
        body = {"userId": user_id, "productId": product_id, "quantity": quantity}
        return client.post("/purchase", json=body, headers=headers)

    return post


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass
class Server:
    """The whole system as `make run` starts it."""

    url: str
    api_token: str
    admin_password: str
    data_dir: Path
    process: subprocess.Popen

    def call(
        self, method: str, path: str, body: object = None, **headers: str
    ) -> tuple[int, dict[str, str], bytes, float]:
        """Send a request; return status, headers by lower-case name, content, seconds."""
        url = urllib.parse.urlsplit(self.url)
        connection = http.client.HTTPConnection(url.hostname, url.port, timeout=30)
        started = time.monotonic()
        if body is not None:
            headers |= {"Content-Type": "application/json"}
            body = json.dumps(body)
        try:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            content = response.read()
        finally:
            connection.close()
        names = {name.lower(): value for name, value in response.getheaders()}
        return response.status, names, content, time.monotonic() - started

    def sign_in(self) -> str:
        """Sign the first admin in as a browser does; return the Cookie header."""
        return sign_in(self.url, self.admin_password)


@pytest.fixture(scope="session")
def server(tmp_path_factory) -> Iterator[Server]:
    """A running system of its own: web, worker, Redis, PostgreSQL."""
    data_dir = tmp_path_factory.mktemp("run")
    started = start_system(data_dir)
    yield started
    stop_system(started)


def start_system(data_dir: Path, **environ: str) -> Server:
    """Start the whole system on a free port and wait until it says that it is ready."""
    clean = {
        name: value
        for name, value in os.environ.items()
        if name not in ("REDIS_URL", "DATABASE_URL", "SECRET_KEY")
    }
    port = free_port()
    log = data_dir / "supervisor.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "app.run.supervisor"],
            cwd=ROOT,
            env=clean | {"DATA_DIR": str(data_dir), "PORT": str(port), **environ},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    wait_until(
        lambda: "Ready:" in log.read_text() or process.poll() is not None, 60, "the system to start"
    )
    if process.poll() is not None:
        pytest.fail(f"the system did not start: {log.read_text()}")
    return Server(
        url=f"http://127.0.0.1:{port}",
        api_token=(data_dir / "admin_api_token").read_text().strip(),
        admin_password=(data_dir / "admin_password").read_text().strip(),
        data_dir=data_dir,
        process=process,
    )


def stop_system(server: Server) -> None:
    server.process.send_signal(signal.SIGTERM)
    server.process.wait(timeout=40)
