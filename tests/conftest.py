"""Real servers for every test: one Redis and one PostgreSQL for all, a clean sale for each."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from unittest.mock import patch

import flask_migrate
import psycopg2
import pytest
from documented import DocumentedClient
from fresh import Fresh
from people import API_TOKEN, PASSWORD, sign_in_once
from system import SHARED, UNLIMITED, Server, start_system, stop_system
from werkzeug.routing import Rule

from app import create_app
from app.books import recovery
from app.config import Settings, load_settings
from app.extensions import db, limiter, stock
from app.orders.drain import drain_batch
from app.run.embedded import PostgresServer, RedisServer
from app.staff import people

HASH = people.generate_password_hash
# What fails a test that leaves something behind or skips, who runs what, and a real browser.
pytest_plugins = ["leftovers", "strict", "order", "browser"]


@pytest.fixture(scope="session")
def servers(tmp_path_factory) -> Iterator[tuple[RedisServer, PostgresServer]]:
    """The run's own Redis and PostgreSQL, on Unix sockets in a temporary directory."""
    folder = tmp_path_factory.mktemp("servers")
    started = (
        RedisServer(folder),
        # A test database need not survive a power cut; the reliability tests use their own.
        PostgresServer(folder, extra=("fsync=off",)),
    )
    try:
        for server in started:
            server.start()
        yield started
    finally:
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
        admin_password=PASSWORD,
        admin_api_token=API_TOKEN,
    )


@pytest.fixture(scope="session")
def quick_passwords() -> Iterator[None]:
    """Hash passwords a hundred times faster than is safe."""
    with patch.object(people, "generate_password_hash", partial(HASH, method="scrypt:256:8:1")):
        yield


@pytest.fixture(scope="session", autouse=True)
def routes_compiled_once() -> Iterator[None]:
    """Compile what builds a route's address once, not for each app: most of an app's making."""
    compile_builder, builders = Rule._compile_builder, {}

    def compile_once(rule: Rule, append_unknown: bool = True):
        known = (rule.rule, rule.subdomain, rule.host, repr(rule.defaults), append_unknown)
        if known not in builders:
            builders[known] = compile_builder(rule, append_unknown)
        return builders[known]

    with patch.object(Rule, "_compile_builder", compile_once):
        yield


@pytest.fixture(scope="session")
def built_app(settings, quick_passwords):
    app = create_app(settings)
    app.test_client_class = DocumentedClient
    app.extensions["its_shards"], app.extensions["its_limiter"] = stock.shards, dict(vars(limiter))
    with app.app_context():
        flask_migrate.upgrade()
    return app


def take_back(app, settings) -> None:
    """Have the app go on: a process has one stock and one limiter, those of the app made last."""
    if stock.shards is not app.extensions["its_shards"]:
        stock.init_app(settings, lambda: recovery.sale_on_record(app))
        app.extensions["its_shards"] = stock.shards
    vars(limiter).update(app.extensions["its_limiter"])


@pytest.fixture(scope="session")
def fresh(built_app, settings) -> Iterator[Fresh]:
    """What makes the shop an empty one."""
    one = Fresh(settings)
    yield one
    one.close()


@pytest.fixture
def app(built_app, settings, fresh):
    """The app with an empty shop but for product 1, which has 100 items."""
    take_back(built_app, settings)
    with built_app.app_context():
        fresh.begin(settings)
    yield built_app
    with built_app.app_context():
        db.session.remove()


@pytest.fixture
def make_app(built_app, settings, fresh):
    """Build an app with other settings on the same servers."""

    def make(**changes):
        app = create_app(replace(settings, **changes))
        app.test_client_class = DocumentedClient
        with app.app_context():
            fresh.begin(app.config["SETTINGS"])
        return app

    yield make
    take_back(built_app, settings)


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
    sign_in_once(app, browser, role)
    return browser


@pytest.fixture
def connect(settings):
    """Open a session beside the app's own."""
    opened = []

    def one():
        opened.append(psycopg2.connect(settings.database_url.replace("+psycopg2", "")))
        return opened[-1].cursor()

    yield one
    for connection in opened:
        connection.close()


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

    def post(user_id, product_id: int = 1, quantity: int = 1, key: str | None = None, **more):
        headers = {"Idempotency-Key": key} if key is not None else {}
        body = {"userId": user_id, "productId": product_id, "quantity": quantity, **more}
        return client.post("/purchase", json=body, headers=headers)

    return post


@pytest.fixture(scope="module")
def system(tmp_path_factory) -> Iterator[Server]:
    """A running system for one module: two web processes, and no limit of attempts."""
    started = start_system(tmp_path_factory.mktemp("run"), **UNLIMITED, WEB_WORKERS="2")
    yield started
    stop_system(started)


_shared: list[Server] = []


@pytest.fixture(scope="module")
def server(pytestconfig, tmp_path_factory) -> Server:
    """A running system: web, worker, Redis, PostgreSQL. Files share it as order.py says."""
    if not _shared:
        _shared.append(start_system(tmp_path_factory.mktemp("run")))
        pytestconfig.stash[SHARED].callback(lambda: stop_system(_shared.pop()))
    return _shared[0]
