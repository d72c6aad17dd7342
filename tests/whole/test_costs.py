"""What things cost, in counts that can't flake: commands, round trips, bytes, statements."""

import uuid
from contextlib import contextmanager

import pytest
from counts import commandstats
from sqlalchemy import event

from app.extensions import db, stock
from app.orders.drain import drain_batch
from app.stock.keys import KEYS
from app.watch.telemetry import Meter


@pytest.fixture
def statements(app):
    """Count the SQL statements of a block: `with statements() as seen: …; len(seen)`."""

    @contextmanager
    def count():
        seen = []

        def note(connection, cursor, statement, *_):
            seen.append(statement)

        with app.app_context():
            engine = db.engine
        event.listen(engine, "before_cursor_execute", note)
        try:
            yield seen
        finally:
            event.remove(engine, "before_cursor_execute", note)

    return count


@pytest.fixture(autouse=True)
def no_reports(monkeypatch):
    """Nothing but what is counted: each second a thread reports the figures of its process."""
    monkeypatch.setattr(Meter, "flush", lambda meter: None)


def commands_of(action) -> dict[str, int]:
    """Return the Redis commands that an action ran, those of scripts included."""
    before = commandstats()
    action()
    after = commandstats()
    changed = {name: after[name] - before.get(name, 0) for name in after}
    if changed.pop("memory|usage", 0):
        # A look at the memory, by the first claim in 50 ms whose shopper is new: noted once.
        changed["hset"] -= 1
    return {name: count for name, count in changed.items() if count and name != "info"}


def test_an_accepted_claim_runs_a_dozen_commands(app, buy):
    buy(1)
    assert commands_of(lambda: buy(2)) == {
        "evalsha": 1, "time": 1, "mget": 1, "hmget": 3, "xlen": 1, "incrby": 1, "xadd": 1,
        "zadd": 1, "hset": 2, "hincrby": 1,
    }  # fmt: skip


def test_who_comes_again_in_the_same_minutes_costs_one_command_less(app, buy):
    buy(1)
    assert commands_of(lambda: buy(1))["hmget"] == 2


def test_a_hold_costs_no_command_more(app, buy, client, admin_headers):
    buy(1)
    sold = commands_of(lambda: buy(2))
    client.patch("/products/1", json={"holdSeconds": 60}, headers=admin_headers)
    assert buy(3).json["status"] == "held"
    assert commands_of(lambda: buy(4)) == sold


def test_a_key_costs_two_commands_more_and_a_replay_seven_in_all(app, buy):
    buy(1)
    keyed = commands_of(lambda: buy(2, key="k"))
    assert (keyed["hget"], keyed["hset"]) == (1, 3)
    assert commands_of(lambda: buy(2, key="k")) == {
        "evalsha": 1, "time": 1, "mget": 1, "hget": 1, "hmget": 2, "hset": 1, "hincrby": 1,
    }  # fmt: skip


def test_refusals_cost_less(app, buy):
    for _ in range(5):
        buy(1, product_id=1, quantity=10)
        buy(2, product_id=1, quantity=10)
    sold_out = commands_of(lambda: buy(3))
    assert sold_out == {"evalsha": 1, "time": 1, "mget": 1, "hmget": 3, "hset": 1, "hincrby": 1}
    limited = commands_of(lambda: buy(1))
    assert limited == {"evalsha": 1, "time": 1, "mget": 1, "hmget": 2, "hincrby": 1}


@pytest.mark.parametrize(("text", "most"), [(False, 120), (True, 290)], ids=["integers", "UUIDs"])
def test_bytes_of_a_waiting_order(client, admin_headers, text, most):
    """The outbox, its index and the bought units; attempts, which pass, are 40 or 70 besides."""
    orders, first = 2560, 1_000_000
    body = {"productId": 1, "amount": orders}
    client.post("/products/restock", json=body, headers=admin_headers)
    users = [
        str(uuid.UUID(int=user * 0x9E3779B97F4A7C15 % 2**128)) if text else user
        for user in range(first, first + orders)
    ]
    stock.client.config_set("appendfsync", "no")
    try:
        for user in users:
            stock.claim(user, 1, 1, None, "127.0.0.1")
    finally:
        stock.client.config_set("appendfsync", "always")
    assert stock.waiting() == orders

    def bytes_of(keys) -> float:
        return sum(stock.client.memory_usage(key, samples=0) or 0 for key in keys) / orders

    buckets = {KEYS.bought(1, user)[0] for user in users}
    assert bytes_of((KEYS.outbox, KEYS.queued, *buckets)) < most
    # The attempts of users, and of the one address.
    assert bytes_of(KEYS.attempts) < 100


def test_a_batch_is_four_statements(app, buy, monkeypatch):
    """BEGIN and lock, the batch's row, a savepoint, the orders; then COMMIT."""

    class Counting:
        def __init__(self, cursor):
            self.cursor = cursor

        def __enter__(self):
            self.cursor.__enter__()
            return self

        def __exit__(self, *error):
            return self.cursor.__exit__(*error)

        def execute(self, statement, *arguments):
            seen.append(statement.split()[0])
            return self.cursor.execute(statement, *arguments)

        def __getattr__(self, name):
            return getattr(self.cursor, name)

    seen: list[str] = []
    for user in range(1, 31):
        buy(user)
    with app.app_context():
        connect = db.engine.raw_connection

        def watched():
            connection = connect()
            cursor = connection.cursor
            connection.cursor = lambda *arguments, **options: Counting(
                cursor(*arguments, **options)
            )
            return connection

        monkeypatch.setattr(db.engine, "raw_connection", watched)
        drained = drain_batch("test", "test")
    assert drained.persisted == 30
    assert seen == ["SET", "INSERT", "SAVEPOINT", "INSERT"]


@pytest.mark.parametrize(
    ("path", "most"),
    [
        ("/purchase/orders/1", 2),
        ("/purchase/metrics", 0),
        ("/products", 1),
        ("/products/1", 1),
    ],
)
def test_statements_of_a_route(client, buy, drain, statements, path, most):
    for user in range(1, 6):
        buy(user)
    drain()
    with statements() as seen:
        assert client.get(path).status_code == 200
    assert len(seen) <= most, seen
