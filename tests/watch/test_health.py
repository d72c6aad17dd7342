"""/readyz and /readyz/sale: true, whoever asks, and without a server's address."""

import asyncio
import json
import re

import psycopg2
import pytest
import redis
from sqlalchemy.exc import OperationalError
from waiting import patience, wait_until
from wire import serving

from app import database, locks
from app.extensions import db, stock
from app.problems import Unavailable, Unprepared
from app.stock.claims import Request
from app.stock.keys import KEYS
from app.watch import health

PARTS = {"redis", "postgres", "migrations", "sale", "worker", "queue"}
ADDRESS = re.compile(r"\d+\.\d+\.\d+\.\d+|[/:]\d{4,5}|\.sock|\.s\.PGSQL|Error \d+|sslmode")


def checks(client) -> dict:
    answer = client.get("/readyz")
    found = answer.json["checks"]
    assert set(found) == PARTS
    well = all(part["ok"] for part in found.values())
    assert (answer.status_code, answer.json["status"]) == (
        (200, "ok") if well else (503, "unavailable")
    )
    assert ("Retry-After" in answer.headers) is not well
    assert not ADDRESS.search(answer.text), answer.text
    return found


@pytest.fixture
def worker(app):
    """A worker that lives, and stores nothing."""
    stock.board.alive("test")


@pytest.fixture
def redis_away(monkeypatch):
    away = redis.Redis.from_url("redis://127.0.0.1:1")
    monkeypatch.setattr(stock.board, "client", away)
    monkeypatch.setattr(stock.first, "client", away)
    for script in stock.first._scripts.values():
        monkeypatch.setattr(script, "registered_client", away)


@pytest.fixture
def postgres_away(monkeypatch):
    def fail(*_, **__):
        raise OperationalError(
            "", {}, psycopg2.OperationalError('connection to server at "10.1.2.3" failed')
        )

    monkeypatch.setattr(db.session.session_factory.class_, "execute", fail)


def test_all_is_well(client, worker):
    assert all(part["ok"] for part in checks(client).values())


def test_without_redis_nobody_is_told_to_rebuild(client, worker, redis_away):
    found = checks(client)
    assert found["redis"] == {"ok": False, "state": "unreachable"}
    assert found["postgres"]["ok"]
    for part in ("sale", "worker", "queue"):
        assert found[part] == {"ok": False, "state": "unknown without Redis"}


def test_without_postgres(client, worker, postgres_away):
    found = checks(client)
    assert found["postgres"] == {"ok": False, "state": "unreachable"}
    assert found["sale"] == {"ok": True, "state": "in Redis, not compared with PostgreSQL"}
    assert found["worker"]["ok"]


def test_a_read_only_postgres_is_not_ready(client, worker, app):
    with app.app_context():
        db.session.execute(db.text("ALTER DATABASE flashsale SET default_transaction_read_only=on"))
        db.session.commit()
        db.session.remove()
        db.engine.dispose()
    try:
        assert checks(client)["postgres"] == {"ok": False, "state": "read-only"}
    finally:
        with app.app_context(), db.engine.connect() as connection:
            connection.exec_driver_sql("SET default_transaction_read_only = off")
            connection.commit()
            connection.exec_driver_sql("ALTER DATABASE flashsale RESET ALL")
            connection.commit()
            connection.invalidate()
            db.engine.dispose()
    assert checks(client)["postgres"]["ok"]


def test_another_sale_in_redis(client, worker):
    stock.client.set(KEYS.generation, "somebody-else")
    assert checks(client)["sale"] == {
        "ok": False, "state": "Redis holds another sale: run `flask rebuild`"
    }  # fmt: skip


def test_no_worker(client):
    found = checks(client)
    assert found["worker"] == {"ok": False, "state": "0 seen lately"}
    assert found["queue"] == {"ok": True, "state": "empty"}


def age_the_queue(monkeypatch, seconds: float) -> None:
    """Let Redis's clock be further by so much, for who asks the board."""
    news = stock.board.news

    def later(samples):
        found = news(samples)
        object.__setattr__(found, "now", found.now + seconds)
        return found

    monkeypatch.setattr(stock.board, "news", later)


def test_orders_that_wait_for_a_moment_are_normal(client, worker, buy):
    buy(1)
    assert checks(client)["queue"]["state"].startswith("1 order waits, the oldest for")
    assert checks(client)["queue"]["ok"]


def test_orders_that_wait_although_a_worker_lives(client, worker, buy, monkeypatch):
    buy(1)
    buy(2)
    age_the_queue(monkeypatch, 30)
    found = checks(client)
    assert found["worker"]["ok"]
    assert re.fullmatch("2 orders wait, the oldest for 3[01] s", found["queue"]["state"])
    assert not found["queue"]["ok"]


def test_a_foreign_holder_of_the_drains_lock_is_named(client, worker, buy, monkeypatch, servers):
    buy(1)
    age_the_queue(monkeypatch, 30)
    holder = psycopg2.connect(
        host=str(servers[1].sockets), user="flashsale", dbname="flashsale", application_name="psql"
    )
    try:
        holder.cursor().execute("SELECT pg_advisory_lock(%s)", [locks.DRAIN_LOCK])
        state = checks(client)["queue"]["state"]
        assert state.endswith("; another session holds the drain's lock")
    finally:
        holder.close()
    wait_until(lambda: "lock" not in checks(client)["queue"]["state"])


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (redis.ConnectionError("Error 111 connecting to 10.1.2.3:6379."), "unreachable"),
        (redis.TimeoutError("Timeout reading from 10.1.2.3:6379"), "not answering in time"),
        (
            redis.ReadOnlyError("You can't write against a read only replica."),
            "a read-only replica",
        ),
        (redis.OutOfMemoryError("command not allowed when used memory"), "out of memory"),
        (redis.ResponseError("MISCONF Errors writing to the AOF file"), "can't write to its disk"),
        (redis.BusyLoadingError("Redis is loading the dataset"), "still loading its data"),
        (redis.AuthenticationError("invalid password"), "refusing the password"),
        (redis.ResponseError("something at 10.1.2.3:6379"), "unreachable"),
        (database.Unanswered("PostgreSQL did not answer in time"), "not answering in time"),
        (psycopg2.OperationalError('server at "10.1.2.3", port 5432'), "unreachable"),
        (psycopg2.errors.lookup("25006")("cannot execute"), "unreachable"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_words_name_the_ailment_and_no_server(error, words):
    assert health.in_words(error) == words
    wrapped = Unavailable(str(error))
    wrapped.__cause__ = error
    assert health.in_words(wrapped) == words


class TestSale:
    """GET /readyz/sale, first as WSGI serves it."""

    def test_it_sells(self, client):
        def compared():
            answer = client.get("/readyz/sale")
            assert answer.status_code == 200
            assert answer.headers["Cache-Control"] == "no-store"
            return answer.json == {"status": "ok"}

        # Where PostgreSQL had no time for it, it is asked again after a few seconds.
        wait_until(compared, what="the comparison with PostgreSQL")

    def test_no_worker_and_no_postgres_don_t_matter(self, client, postgres_away):
        assert client.get("/readyz").status_code == 503
        assert client.get("/readyz/sale").status_code == 200

    def test_a_sale_that_is_not_there(self, client):
        stock.client.delete(KEYS.generation)
        answer = client.get("/readyz/sale")
        assert answer.status_code == 503
        assert answer.headers["Retry-After"]


def probing(app, conversation, verified: bool = True):
    """Hold a conversation with the real server about /readyz/sale."""

    async def whole():
        async with serving(app) as process:
            if verified:
                stock.loop_line.line._on_record = stock.first.thread_line._on_record

            async def probe() -> tuple[int, dict]:
                wire = await process.connect()
                wire.send(b"GET /readyz/sale HTTP/1.1\r\nHost: a\r\n\r\n")
                reply = await wire.reply()
                assert "x-request-id" in reply.headers
                return reply.status, json.loads(reply.body)

            return await conversation(probe)

    return asyncio.run(whole())


async def until(probe, wanted: tuple[int, dict]) -> None:
    async with asyncio.timeout(patience(5)):
        while await probe() != wanted:
            await asyncio.sleep(0.05)


OK, UNVERIFIED = (200, {"status": "ok"}), (200, {"status": "ok", "unverified": True})


class TestSaleOnTheEventLoop:
    def test_before_the_first_purchase(self, app):
        async def talk(probe):
            # Where PostgreSQL had no time for it, it is asked again after a few seconds.
            await until(probe, OK)

        probing(app, talk)

    def test_unverified_until_postgres_can_tell(self, app):
        """It sells meanwhile, as ever, and compares as soon as it can."""

        async def talk(probe):
            assert await probe() == UNVERIFIED
            line = stock.loop_line.line
            assert (await line.claim(Request(1, 1, 1, None, "10.0.0.1"))).outcome == b"accepted"
            line._on_record = stock.first.thread_line._on_record
            await until(probe, OK)

        probing(app, talk, verified=False)

    def test_another_sale_is_noticed_when_postgres_can_tell(self, app):
        async def talk(probe):
            assert await probe() == UNVERIFIED
            line = stock.loop_line.line
            line._on_record = lambda: ("the sale that should be there", 1)
            async with asyncio.timeout(patience(5)):
                while (await probe())[0] != 503:
                    await asyncio.sleep(0.05)
            with pytest.raises(Unavailable):
                await line.claim(Request(1, 1, 1, None, "10.0.0.1"))

        probing(app, talk, verified=False)

    def test_a_redis_that_takes_no_writes_can_t_sell(self, app):
        async def talk(probe):
            assert await probe() == OK
            used = stock.client.info("memory")["used_memory"]
            stock.client.config_set("maxmemory", max(1, used // 2))
            try:
                await until(probe, (503, {"status": "unavailable", "reason": "out of memory"}))
            finally:
                stock.client.config_set("maxmemory", 0)
            await until(probe, OK)

        probing(app, talk)

    def test_a_sale_that_is_gone_and_back(self, app):
        async def talk(probe):
            assert await probe() == OK
            name = stock.client.get(KEYS.generation)
            stock.client.delete(KEYS.generation)
            await until(probe, (503, {"status": "unavailable", "reason": "without this sale"}))
            stock.client.set(KEYS.generation, name)
            await until(probe, OK)

        probing(app, talk)


class TestSaleOfSeveralShards:
    """It is ready as long as one of them is: shoppers of the others are told by their claims."""

    @pytest.fixture
    def six(self, make_app):
        return make_app(shards=6)

    def test_as_wsgi(self, six):
        client = six.test_client()
        assert client.get("/readyz/sale").status_code == 200
        for shard in stock.shards[1:]:
            stock.client.delete(shard.keys.generation)
        assert client.get("/readyz/sale").status_code == 200
        stock.client.delete(stock.first.keys.generation)
        assert client.get("/readyz/sale").status_code == 503

    def test_on_the_event_loop(self, six):
        async def talk():
            lines, first = stock.loop_line.line, stock.first.keys.generation
            name = stock.client.get(first)
            await lines.check()
            stock.client.delete(*(shard.keys.generation for shard in stock.shards))
            with pytest.raises(Unprepared):
                await lines.check()
            stock.client.set(first, name)
            await lines.check()

        asyncio.run(talk())
