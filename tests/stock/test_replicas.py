"""Nothing that is promised leaves a Redis before its replica has it: what a failover can't undo.

The replica is cut off; things happen; the primary dies, and the replica takes its place. Whatever
was promised meanwhile is lost: so nothing may have been.
"""

import asyncio
from contextlib import suppress

import pytest
import redis
from nodes import Pair
from sqlalchemy import text
from waiting import wait_until

from app import create_app
from app.audit import CLI
from app.books import recovery
from app.config import NO_LIMIT, SettingsError, load_settings
from app.extensions import db, stock
from app.orders.drain import drain_batch
from app.problems import Unavailable
from app.stock import claims, replicas
from app.stock.claims import Request
from app.stock.keys import KEYS
from app.stock.link import Link, Question, scripts
from app.stock.loop_line import LoopLine
from app.stock.servers import Server
from app.stock.shard import Shard
from app.stock.thread_line import ThreadLine
from app.worker import relay


@pytest.fixture
def pair(tmp_path):
    pair = Pair("valkey", tmp_path)
    yield pair
    pair.stop()


@pytest.fixture
def app(pair, make_app, settings):
    yield make_app(
        redis_url=f"redis://127.0.0.1:{pair.a.port}",
        redis_replicas=1,
        purchase_user_limit=NO_LIMIT,
    )
    create_app(settings)


def claim_of(line: ThreadLine, user: int, key: str | None = None) -> str:
    """Return the outcome, or whether it is unknown or surely nothing."""
    try:
        return line.claim(Request(user, 1, 1, key, "a")).outcome.decode()
    except Unavailable as error:
        return "nothing" if error.executed is False else "unknown"


def another_line(app) -> ThreadLine:
    """A line of another process, which has connected while all was well."""
    script = claims.ClaimScript(claim_script(), app.config["SETTINGS"])
    line = ThreadLine(stock.first.server, script, lambda: None)
    assert claim_of(line, 900, "early") in ("accepted", "replayed")
    return line


def claim_script() -> str:
    return scripts()["claim"]


def promises(app, leave) -> list[str]:
    """Return what is promised of the last order after `leave`, from when no replica gets anything.

    Order 1 is of `another_line`, 2 to 6 are on the replica, 7 is not.
    """
    one, other = another_line(app), another_line(app)
    for user in range(1, 6):
        assert claim_of(stock.thread_line, user, "k") == "accepted"
    leave()
    told = [f"a claim is {claim_of(one, 50, 'late')}", f"a replay is {claim_of(other, 50, 'late')}"]
    promised = [one for one in told if one.endswith(("accepted", "replayed"))]
    with app.app_context():
        relay.record_issued()
        with suppress(Unavailable):
            drain_batch("test", "test")
        db.session.rollback()
        stored, issued, name = db.session.execute(
            text("SELECT (SELECT max(id) FROM orders), last_order_id, generation FROM sale")
        ).one()
        db.session.rollback()
    assert name == stock.generation()
    if (stored or 0) > 6:
        promised.append("it is stored")
    if issued > 6:
        promised.append("it is on record")
    with suppress(Unavailable):
        stock.first.close(name)
        promised.append("the sale is closed")
    return promised


def test_a_failover_loses_nothing_that_was_promised(app, pair):
    generation = stock.generation()
    assert promises(app, pair.b.cut_off) == []
    pair.lose_a()
    assert pair.b.client.get(KEYS.order_ids) == "6"
    assert pair.b.client.get(KEYS.generation) == generation


def test_a_replica_that_stands_still_has_nothing(app, pair):
    """It is still connected, so WAIT is easily content."""
    assert promises(app, pair.b.stop) == []
    pair.b.go_on()


# Each a way to forget it, and what is then promised in vain.
def forget_wait(monkeypatch, app):
    monkeypatch.setattr(replicas.Replicas, "enough", lambda self, answer: True)


def forget_the_replay_s_write(monkeypatch, app):
    broken = claim_script().replace("if REPLICAS > 0 and replayed then", "if false then")
    monkeypatch.setitem(scripts(), "claim", broken)


def forget_the_fence(monkeypatch, app):
    def run(self, pipe):
        # A connection that has written nothing yet, as most have not since the replica's last word.
        pipe.connection_pool.disconnect(inuse_connections=False)
        *answers, copied = pipe.execute_command(*self.commands[-1]).execute()
        if not self.enough(copied):
            raise replicas.Unreplicated(copied)
        return answers

    def surely(self, question):
        self.client.connection_pool.disconnect(inuse_connections=False)

        def read(answers):
            if not self.replicas.enough(answers[-1]):
                raise replicas.Unreplicated(answers[-1])
            return question.read(answers[:-1])

        return Question([*question.commands, self.replicas.commands[-1]], read, question.script)

    monkeypatch.setattr(replicas.Replicas, "run", run)
    monkeypatch.setattr(Link, "surely", surely)


@pytest.mark.parametrize(
    ("forget", "promised"),
    [
        (
            forget_wait,
            [
                "a claim is accepted",
                "a replay is replayed",
                "it is stored",
                "it is on record",
                "the sale is closed",
            ],
        ),
        (forget_the_replay_s_write, ["a replay is replayed"]),
        (forget_the_fence, ["it is stored", "it is on record"]),
    ],
)
def test_a_promise_in_vain_is_found(app, pair, monkeypatch, forget, promised):
    stock.view([])
    forget(monkeypatch, app)
    assert promises(app, pair.b.stop) == promised
    pair.b.go_on()


def test_it_sells_again_when_the_replica_is_back(app, pair):
    line = another_line(app)
    pair.b.cut_off()
    assert claim_of(line, 50, "k") == "unknown"
    # Closed: nobody else is left in the dark, and nobody waits.
    assert claim_of(line, 51, "k") == "nothing"
    pair.b.follow(pair.a)
    outcomes = []
    wait_until(lambda: outcomes.append(claim_of(line, 50, "k")) or outcomes[-1] == "replayed", 10)
    assert set(outcomes[:-1]) <= {"nothing"}
    assert claim_of(line, 51, "k") == "accepted"


def test_the_event_loop_keeps_back_promises_alone(app, pair):
    """Refusals of the same batch go out at once; and claims gather while others wait."""

    async def talk():
        line = LoopLine(stock.first.server, stock.loop_line.line.script, lambda: None)
        assert (await line.claim(Request(1, 1, 1, None, "a"))).outcome == b"accepted"
        loop, cut_off = asyncio.get_running_loop(), pair.b.cut_off
        cut_off()
        started, told = loop.time(), {}

        def ask(name, product):
            line.ask(
                Request(2, product, 1, name, "a"),
                lambda result: told.update({name: (result, loop.time() - started)}),
            )

        ask("sold", 1)
        ask("refused", 99)
        while "sold" not in told:
            await asyncio.sleep(0.01)
        assert told["refused"][0].outcome == b"unknown"
        assert told["refused"][1] < told["sold"][1] - 0.3
        assert isinstance(told["sold"][0], Unavailable)
        assert told["sold"][0].executed is None
        with pytest.raises(Unavailable) as refused:
            await line.claim(Request(3, 1, 1, None, "a"))
        assert refused.value.executed is False
        pair.b.follow(pair.a)
        for _ in range(200):
            with_key = Request(2, 1, 1, "sold", "a")
            try:
                claim = await line.claim(with_key)
                break
            except Unavailable:
                await asyncio.sleep(0.05)
        assert claim.outcome == b"replayed"
        # Many at once go in few batches, each waited for.
        claims = [line.claim(Request(user, 1, 1, "k", "a")) for user in range(10, 90)]
        return await asyncio.gather(*claims)

    claims = asyncio.run(talk())
    assert {claim.outcome for claim in claims} == {b"accepted"}
    assert len({claim.detail for claim in claims}) == 80


def test_replays_where_memory_is_short(app, pair):
    line = another_line(app)
    pair.a.client.config_set("maxmemory", 1)
    try:
        assert claim_of(line, 900, "early") == "replayed"
        assert claim_of(line, 901, "new") == "nothing"
        stock.first.check_replicas()
    finally:
        pair.a.client.config_set("maxmemory", 0)
    assert claim_of(line, 901, "new") == "accepted"


def test_a_movement_is_not_marked_as_applied_too_early(app, pair, client, admin_headers):
    body = {"productId": 1, "amount": 5}
    pair.b.cut_off()
    answer = client.post(
        "/products/restock", json=body, headers={**admin_headers, "Idempotency-Key": "r"}
    )
    assert answer.status_code == 503
    with app.app_context():
        pending = "SELECT count(*) FROM stock_movements WHERE applied_at IS NULL"
        assert db.session.connection().exec_driver_sql(pending).scalar() == 1
    pair.b.follow(pair.a)

    def again():
        return client.post(
            "/products/restock", json=body, headers={**admin_headers, "Idempotency-Key": "r"}
        )

    wait_until(lambda: again().status_code == 200, 10, "the restock")
    assert stock.view([1]).products[1]["free"] == 105


def test_a_rebuild_across_a_failover_opens_nothing(app, pair, monkeypatch):
    put = Shard.put_movements

    def fail_over(self, bits):
        pair.a.kill()
        pair.a.start()
        pair.b.synced()
        for client in (self.client, self.raw_client):
            client.connection_pool.disconnect()
        put(self, bits)

    monkeypatch.setattr(Shard, "put_movements", fail_over)
    with app.app_context():
        with pytest.raises(Unavailable, match="start again"):
            recovery.rebuild(CLI)
        assert stock.generation() is None
        monkeypatch.setattr(Shard, "put_movements", put)
        pair.b.synced()
        recovery.rebuild(CLI)
    assert claim_of(stock.thread_line, 5) in ("accepted", "nothing")


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("redis://127.0.0.1:7", None),
        ("unix:///nowhere", None),
    ],
)
def test_a_plain_url_names_its_server(url, address):
    assert Server(url).address() == address


@pytest.mark.parametrize("url", ["redis+sentinel://a:1", "redis+sentinel:///name"])
def test_a_sentinel_s_url_is_complete(url):
    with pytest.raises(ValueError, match="sentinel"):
        Server(url)


def test_what_a_sentinel_s_url_says():
    server = Server("redis+sentinel://u:p%40@a,b:7/sale?db=3&sentinel_password=s")
    assert server.options == {"username": "u", "password": "p@", "db": 3}
    asked = [each.connection_pool.connection_kwargs for each in server._find._sentinels.sentinels]
    assert [(each["host"], each["port"], each["password"]) for each in asked] == [
        ("a", 26379, "s"),
        ("b", 7, "s"),
    ]


def test_nobody_to_ask_is_a_lost_connection():
    client = Server("redis+sentinel://127.0.0.1:1/sale").client(decode=True)
    with pytest.raises(redis.ConnectionError):
        client.ping()


def test_one_server_that_hangs_closes_no_other():
    one, other = Server("redis://127.0.0.1:1"), Server("redis://127.0.0.1:2")
    one.breaker.waited_in_vain()
    one.leave()
    assert not one.breaker.admits()
    assert other.breaker.admits()
    assert other.unfit == 0


def test_a_cluster_is_asked_until_a_node_knows(pair):
    server = Server(f"redis+cluster://127.0.0.1:1,127.0.0.1:{pair.a.port}")
    for _ in range(2):
        # One is away, the other is no cluster; whoever comes first.
        with pytest.raises(redis.ConnectionError, match="refused") as found:
            server.address()
        assert "cluster support disabled" in str(found.value)


@pytest.mark.parametrize("url", ["redis+cluster://a/1", "redis+cluster://", "redis+cluster://a,"])
def test_a_cluster_s_url_names_nodes_alone(url):
    with pytest.raises(SettingsError, match="REDIS_URL"):
        load_settings({"REDIS_URL": url})
