"""A PostgreSQL that can't do its work: what is answered, that nothing is kept of it, and recovery.

One server of its own, since it is made read-only, full and crowded.
"""

import contextlib
import os
import signal
import threading
import time
from dataclasses import replace
from urllib.parse import quote

import flask_migrate
import people
import psycopg2
import pytest
from people import API_TOKEN
from psycopg2 import errorcodes
from sqlalchemy import text
from waiting import patience, wait_until

from app import create_app, database
from app.audit import CLI
from app.books import recovery
from app.config import load_settings
from app.extensions import db, stock
from app.orders.drain import drain_batch
from app.products import catalogue
from app.run.embedded import PostgresServer
from app.worker import jobs

HEADERS = {"Authorization": f"Bearer {API_TOKEN}"}
BACK_WITHIN_SECONDS = 2.0


@pytest.fixture(scope="module")
def postgres(tmp_path_factory):
    server = PostgresServer(
        tmp_path_factory.mktemp("postgres"), extra=("fsync=off", "max_connections=20")
    )
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def built(settings, postgres):
    app = create_app(replace(settings, database_url=postgres.url))
    with app.app_context():
        flask_migrate.upgrade()
    return app


@pytest.fixture
def operator(postgres):
    """Somebody who may do anything to the server, on a connection past the app's."""
    connection = psycopg2.connect(
        host=str(postgres.sockets), user="flashsale", dbname="flashsale",
        options="-c default_transaction_read_only=off",
    )  # fmt: skip
    connection.autocommit = True
    with connection.cursor() as cursor:
        yield cursor.execute
    connection.close()


@pytest.fixture
def shop(built, settings, operator):
    """The app on this PostgreSQL, with product 1; well again afterwards, whatever a test did."""
    stock.init_app(built.config["SETTINGS"], lambda: recovery.sale_on_record(built))
    with built.app_context():
        stock.client.flushdb()
        recovery.reset(CLI)
        db.session.remove()
    yield built
    operator("ALTER SYSTEM RESET ALL")
    operator("SELECT pg_reload_conf()")
    operator("ALTER DATABASE flashsale RESET ALL")
    operator("DROP TRIGGER IF EXISTS trouble ON stock_movements")
    operator("DROP TRIGGER IF EXISTS trouble ON orders")
    with built.app_context():
        db.session.remove()
        db.engine.dispose()
    stock.init_app(settings)


def restock(browser):
    return browser.post("/products/restock", json={"productId": 1, "amount": 1}, headers=HEADERS)


def create(browser):
    body = {"name": "p", "priceCents": 1, "currency": "USD", "stock": 1}
    return browser.post("/products", json=body, headers=HEADERS)


def change(browser):
    change.price += 1
    return browser.patch("/products/1", json={"priceCents": change.price}, headers=HEADERS)


change.price = 100


def sign_in(browser):
    return people.sign_in(browser)


WRITES = {"restock": restock, "create": create, "change": change, "sign-in": sign_in}


def assert_unavailable(answer) -> None:
    assert (answer.status_code, answer.headers.get("Retry-After")) == (503, "1")
    assert "Traceback" not in answer.text


def buy(browser, user: int) -> int:
    answer = browser.post("/purchase", json={"userId": user, "productId": 1})
    assert answer.status_code == 200
    return answer.json["orderId"]


def drain_by_job(app) -> str:
    """Run what RQ would run; an exception here would be a failed job there."""
    with app.app_context():
        return jobs.persist_orders()


# How it gets read-only, and well again: for sessions that exist, and for new ones alone.
READ_ONLY = {
    "all sessions": (
        ["ALTER SYSTEM SET default_transaction_read_only = on", "SELECT pg_reload_conf()"],
        ["ALTER SYSTEM RESET default_transaction_read_only", "SELECT pg_reload_conf()"],
    ),
    "new sessions": (
        ["ALTER DATABASE flashsale SET default_transaction_read_only = on"],
        ["ALTER DATABASE flashsale RESET default_transaction_read_only"],
    ),
}


@pytest.fixture(params=READ_ONLY)
def read_only(shop, operator, request):
    """Make PostgreSQL read-only, and every session of the app with it; returns how to undo it."""
    with shop.app_context():
        people.create_person(shop, "admin")
        db.session.remove()
        db.engine.dispose()
    begin, end = READ_ONLY[request.param]
    for statement in begin:
        operator(statement)

    def writable() -> bool:
        with shop.app_context(), db.engine.connect() as connection:
            return connection.scalar(text("SHOW transaction_read_only")) == "off"

    wait_until(lambda: not writable(), 5, "PostgreSQL to be read-only")

    def heal():
        for statement in end:
            operator(statement)

    return heal


@pytest.mark.parametrize("write", WRITES)
def test_read_only_is_503_and_heals_by_itself(shop, read_only, write):
    browser = shop.test_client()
    assert_unavailable(WRITES[write](browser))
    # Reading goes on, on as many sessions as there are.
    assert browser.get("/products").status_code == 200
    buy(browser, 1)
    read_only()
    wait_until(
        lambda: WRITES[write](browser).status_code in (200, 201, 302),
        BACK_WITHIN_SECONDS,
        f"{write} to work again",
    )


def test_a_pool_full_of_read_only_sessions_heals_before_the_first_write(shop, read_only):
    with shop.app_context():
        connections = [db.engine.connect() for _ in range(5)]
        for connection in connections:
            assert connection.scalar(text("SHOW transaction_read_only")) == "on"
        for connection in connections:
            connection.close()
    read_only()
    threading.Event().wait(database.READ_ONLY_SECONDS + 0.2)
    for _ in range(8):
        assert restock(shop.test_client()).status_code == 200


def test_a_drain_that_meets_a_read_only_server_waits(shop, read_only):
    order_id = buy(shop.test_client(), 1)
    for _ in range(3):
        assert drain_by_job(shop).startswith("nothing stored, the orders wait: cannot execute")
    with shop.app_context():
        assert stock.waiting() == 1
    read_only()
    wait_until(lambda: drain_by_job(shop) == "persisted 1 order", BACK_WITHIN_SECONDS)
    (order,) = shop.test_client().get("/purchase/orders/1").json
    assert (order["id"], order["status"]) == (order_id, "CONFIRMED")


def trouble(operator, code: str, table: str) -> None:
    """Let every insert into a table fail with a code of PostgreSQL's."""
    operator(
        "CREATE OR REPLACE FUNCTION trouble() RETURNS trigger LANGUAGE plpgsql AS"
        f" $$ BEGIN RAISE EXCEPTION 'trouble' USING ERRCODE = '{code}'; END $$"
    )
    operator(
        f"CREATE TRIGGER trouble BEFORE INSERT ON {table}"
        " FOR EACH STATEMENT EXECUTE FUNCTION trouble()"
    )


CODES = {
    name: getattr(errorcodes, name)
    for name in (
        "CONNECTION_FAILURE", "READ_ONLY_SQL_TRANSACTION", "SERIALIZATION_FAILURE",
        "DEADLOCK_DETECTED", "DISK_FULL", "OUT_OF_MEMORY", "TOO_MANY_CONNECTIONS",
        "INSUFFICIENT_RESOURCES", "OBJECT_IN_USE", "LOCK_NOT_AVAILABLE", "QUERY_CANCELED",
        "ADMIN_SHUTDOWN", "CRASH_SHUTDOWN", "CANNOT_CONNECT_NOW", "IO_ERROR",
        "IDLE_IN_TRANSACTION_SESSION_TIMEOUT", "INSUFFICIENT_PRIVILEGE", "INTERNAL_ERROR",
    )
}  # fmt: skip


@pytest.mark.parametrize("code", CODES.values(), ids=CODES)
def test_every_state_that_passes_is_503_and_no_dead_letter(shop, operator, code):
    browser = shop.test_client()
    buy(browser, 1)
    trouble(operator, code, "orders")
    trouble(operator, code, "stock_movements")
    assert_unavailable(restock(browser))
    assert drain_by_job(shop).startswith("nothing stored, the orders wait: trouble")
    operator("DROP TRIGGER trouble ON orders")
    operator("DROP TRIGGER trouble ON stock_movements")
    assert drain_by_job(shop) == "persisted 1 order"
    assert restock(browser).status_code == 200


def test_a_refusal_is_still_a_dead_letter(shop, operator):
    buy(shop.test_client(), 1)
    trouble(operator, errorcodes.CHECK_VIOLATION, "orders")
    assert drain_by_job(shop) == "persisted 0 orders, 1 to the dead letters"


def test_a_fault_of_ours_is_still_a_500(shop, monkeypatch):
    def wrong(*_):
        db.session.execute(text("SELEKT"))

    monkeypatch.setattr(catalogue, "listed", wrong)
    assert shop.test_client().get("/products").status_code == 500


def backends(operator_execute) -> None:
    operator_execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE application_name = 'flash-sale' AND pid <> pg_backend_pid()"
    )


def test_terminated_sessions_are_renewed_without_an_error(shop, operator):
    browser = shop.test_client()
    for _ in range(3):
        assert restock(browser).status_code == 200
        backends(operator)
        assert browser.get("/products").status_code == 200


def test_a_session_that_ends_after_the_answer_was_made_spoils_nothing(shop, operator):
    with shop.test_request_context("/products"):
        assert shop.preprocess_request() is None
        db.session.execute(text("SELECT 1"))
        backends(operator)
        # What the end of the request does; it must not raise.
        db.session.remove()
    assert shop.test_client().get("/products").status_code == 200


def test_no_connection_left_at_the_server_is_503(shop, postgres):
    browser = shop.test_client()
    with shop.app_context():
        db.engine.dispose()
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(psycopg2.OperationalError):
            while True:
                taken = psycopg2.connect(
                    host=str(postgres.sockets), user="flashsale", dbname="flashsale"
                )
                stack.callback(taken.close)
        for write in WRITES.values():
            if write is not sign_in:
                assert_unavailable(write(browser))
        buy(browser, 1)
        assert drain_by_job(shop).startswith("nothing stored")
    wait_until(lambda: restock(browser).status_code == 200, BACK_WITHIN_SECONDS)


def test_no_connection_left_in_the_pool_is_503(shop):
    with shop.app_context(), contextlib.ExitStack() as stack:
        for _ in range(database.ENGINE_OPTIONS["pool_size"] + 10):
            stack.enter_context(db.engine.connect())
        assert_unavailable(shop.test_client().get("/products"))
    assert shop.test_client().get("/products").status_code == 200


def test_a_lock_that_is_not_to_be_had_is_503(shop, operator):
    operator("ALTER DATABASE flashsale SET lock_timeout = '100ms'")
    with shop.app_context():
        db.engine.dispose()
        with db.engine.connect() as holder:
            holder.execute(text("LOCK TABLE stock_movements IN ACCESS EXCLUSIVE MODE"))
            assert_unavailable(restock(shop.test_client()))
    assert restock(shop.test_client()).status_code == 200


def test_a_deadlock_is_503_for_one_of_them(shop):
    def lock(connection, product_id):
        statement = "SELECT 1 FROM products WHERE id = :id FOR UPDATE"
        connection.execute(text(statement), {"id": product_id})

    browser = shop.test_client()
    other = create(browser).json["id"]
    errors = []
    with shop.app_context(), db.engine.connect() as one, db.engine.connect() as two:
        lock(one, 1)
        lock(two, other)

        def cross():
            try:
                lock(two, 1)
            except Exception as error:
                errors.append(error)

        thread = threading.Thread(target=cross)
        thread.start()
        try:
            lock(one, other)
        except Exception as error:
            errors.append(error)
        one.rollback()
        thread.join()
        two.rollback()
    (error,) = errors
    assert database.sqlstate(error) == errorcodes.DEADLOCK_DETECTED
    assert database.is_unavailable(error)


def test_the_drain_renews_its_sessions_by_itself(shop, operator):
    """Its errors never pass SQLAlchemy, which would notice."""
    browser = shop.test_client()
    buy(browser, 1)
    trouble(operator, errorcodes.ADMIN_SHUTDOWN, "orders")
    with shop.app_context():
        before = db.engine.pool
        with pytest.raises(psycopg2.OperationalError):
            drain_batch("", "")
        assert db.engine.pool is not before
        operator("DROP TRIGGER trouble ON orders")
        assert drain_batch("", "").persisted == 1


@pytest.mark.parametrize("command", [["ledger", "check"], ["staff", "list"], ["seed", "--yes"]])
def test_a_command_says_it_in_one_line(shop, operator, command):
    """Here its tables are gone: a database that is not (or not yet) this system's."""
    operator("ALTER TABLE sale RENAME TO elsewhere")
    operator("ALTER TABLE staff RENAME TO elsewhere_too")
    try:
        result = shop.test_cli_runner().invoke(args=command)
    finally:
        operator("ALTER TABLE elsewhere RENAME TO sale")
        operator("ALTER TABLE elsewhere_too RENAME TO staff")
    assert result.exit_code == 1
    # `seed` has told by then what it would delete.
    line = result.output.splitlines()[-1]
    assert line.startswith("Error: PostgreSQL is without this system's tables")
    assert line.endswith("run `flask prepare`")


def test_a_url_with_two_hosts_finds_the_one_that_writes(postgres, tmp_path, settings, built_app):
    second = PostgresServer(tmp_path, extra=("fsync=off", "default_transaction_read_only=on"))
    second.start()
    try:
        hosts = f"host={quote(str(second.sockets))}&host={quote(str(postgres.sockets))}"
        url = f"postgresql://flashsale@/flashsale?{hosts}&target_session_attrs=read-write"
        url = load_settings({"DATABASE_URL": url, "REDIS_URL": settings.redis_url}).database_url
        app = create_app(replace(settings, database_url=url))
        with app.app_context():
            found = db.session.scalar(text("SHOW unix_socket_directories"))
            db.session.remove()
            db.engine.dispose()
        assert str(postgres.sockets) in found
    finally:
        second.stop()
        stock.init_app(settings, lambda: recovery.sale_on_record(built_app))


def test_the_end_of_a_request_waits_no_longer_than_a_request(shop):
    """Flask's request is over by then, and its client still waits for the answer."""
    with shop.test_request_context():
        backend = db.session.scalar(text("SELECT pg_backend_pid()"))
        os.kill(backend, signal.SIGSTOP)
        # Not for ever, should this test fail.
        rescue = threading.Timer(patience(10), os.kill, (backend, signal.SIGCONT))
        rescue.start()
        started = time.monotonic()
    took = time.monotonic() - started
    rescue.cancel()
    os.kill(backend, signal.SIGCONT)
    assert took < patience(2)
    assert shop.test_client().get("/products").status_code == 200
