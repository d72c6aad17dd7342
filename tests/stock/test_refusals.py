"""What refused shoppers cost Redis: bounded memory, nothing in its log, no other product's sale."""

from dataclasses import replace
from ipaddress import IPv4Address

import pytest
from waiting import wait_until

from app.config import NO_LIMIT, RateLimit
from app.extensions import stock
from app.problems import Unavailable
from app.run.embedded import RedisServer
from app.stock.claims import Request
from app.stock.gateway import Stock
from app.stock.keys import KEYS

MEGABYTE = 1 << 20


def refuse(count: int, first: int = 1_000_000) -> list[bytes]:
    """Let new users at new addresses try to buy product 1; return the outcomes."""
    script = stock.thread_line.script
    pool = stock.raw_client.connection_pool
    connection = pool.get_connection()
    outcomes = []
    try:
        for start in range(first, first + count, 500):
            users = range(start, min(start + 500, first + count))
            commands = [
                script.command(Request(user, 1, 1, None, str(IPv4Address(user)))) for user in users
            ]
            connection.send_packed_command((script.load, *commands))
            answers = [connection.read_response() for _ in range(len(commands) + 1)]
            outcomes += [claims[0][0] for claims in answers[1:]]
    finally:
        pool.release(connection)
    return outcomes


@pytest.fixture
def sold_out(client, buy, admin_headers) -> int:
    """Sell product 1 out; return the id of another with 1,000 items."""
    for user in range(1, 11):
        assert buy(user, quantity=10).status_code == 200
    lamp = {"name": "Lamp", "priceCents": 1999, "currency": "EUR", "stock": 1000}
    return client.post("/products", json=lamp, headers=admin_headers).json["id"]


@pytest.fixture
def bounded(app):
    """Leave Redis so many bytes more than it uses."""

    def leave(room: int) -> None:
        stock.client.config_set("maxmemory", stock.client.info("memory")["used_memory"] + room)

    yield leave
    stock.client.config_set("maxmemory", 0)


@pytest.mark.drill
def test_a_sold_out_product_stops_no_other_sale(client, buy, sold_out, bounded):
    first = buy(500, product_id=sold_out, key="k")
    bounded(3 * MEGABYTE)
    # Each is told the truth, whether or not there was room to note the attempt.
    assert set(refuse(40_000)) == {b"sold_out"}
    own = sum(stock.client.memory_usage(key, samples=0) or 0 for key in KEYS.attempts)
    assert own < 2 * MEGABYTE
    for user in range(501, 601):
        assert buy(user, product_id=sold_out).status_code == 200
    assert client.get("/purchase/orders/501").status_code == 200
    assert buy(500, product_id=sold_out, key="k").json == first.json


def test_known_shoppers_are_limited_where_new_ones_can_t_be_noted(buy, sold_out, bounded):
    # Of one turn of the hashes: in the next one everybody is new. A busy machine may need a second.
    for user in range(700, 710):
        began = turn()
        for _ in range(3):
            buy(user, product_id=sold_out)
        bounded(MEGABYTE)
        refuse(20_000)
        statuses = [buy(user, product_id=sold_out).status_code for _ in range(3)]
        if turn() == began:
            break
        bounded(100 * MEGABYTE)
    assert statuses == [200, 200, 429]


def turn() -> int:
    """Return the number of the attempts' turn, which is two of an address's windows long."""
    return stock.client.time()[0] // 120


def test_a_full_redis_refuses_truly_and_replays(buy, sold_out, bounded):
    first = buy(500, product_id=sold_out, key="k")
    bounded(-MEGABYTE)
    for _ in range(3):
        again = buy(500, product_id=sold_out, key="k")
        assert (again.status_code, again.json) == (200, first.json)
        assert again.headers["Idempotent-Replayed"] == "true"
    assert buy(500, product_id=sold_out, key="k", quantity=2).status_code == 422
    assert buy(501).json["code"] == "sold_out"
    refused = buy(502, product_id=sold_out)
    assert (refused.status_code, refused.json["executed"]) == (503, False)
    bounded(10 * MEGABYTE)
    assert buy(502, product_id=sold_out).status_code == 200


def test_refusals_leave_nothing_in_the_log(tmp_path, settings):
    """Neither when they happen nor when they are forgotten, which is where expiry would log."""
    server = RedisServer(tmp_path)
    server.start()
    try:
        # Short turns: early clicks, where users are limited, have a window of a minute.
        short = {
            "purchase_user_limit": NO_LIMIT,
            "purchase_address_limit": RateLimit(3000, 500),
        }
        other = Stock()
        other.init_app(replace(settings, redis_url=server.url, **short))
        other.client.set(KEYS.generation, "sale")
        terms = dict.fromkeys(("opens", "closes", "cap"))
        other.put_product(1, 1, terms | {"pause": 0, "max": 10, "price": "1 USD", "hold": None})
        before = other.client.info("persistence")["aof_current_size"]
        for user in range(1, 1001):
            assert other.claim(user, 1, 1, None, str(IPv4Address(user))).outcome == b"sold_out"

        def forgotten():
            other.claim(1, 1, 1, None, "a")
            return sum(map(other.client.hlen, KEYS.attempts)) < 20

        wait_until(forgotten, 5, "the attempts to be forgotten")
        # Nothing that expires is left behind either, to be logged later.
        assert other.client.info("keyspace")["db0"]["expires"] == 0
        assert other.client.info("persistence")["aof_current_size"] == before
    finally:
        server.stop()


@pytest.mark.parametrize(
    "key",
    [
        KEYS.product(1), KEYS.outbox, KEYS.queued, KEYS.bought(1, 7)[0], KEYS.order_ids,
        *KEYS.attempts,
    ],
)  # fmt: skip
def test_a_key_of_another_type_takes_no_unit(app, client, key):
    """All or nothing also where a write fails midway: what was written before is taken back."""
    stock.claim(6, 1, 1, None, "a")
    watched = (
        KEYS.product(1), KEYS.outbox, KEYS.queued, KEYS.bought(1, 7)[0], KEYS.order_ids,
        KEYS.idempotency(7, "k")[0],
    )  # fmt: skip
    held = {name: stock.raw_client.dump(name) for name in (*watched, *KEYS.attempts)}
    stock.client.delete(key)
    stock.client.geoadd(key, (0, 0, "x")) if key != KEYS.queued else stock.client.set(key, "x")
    body = {"userId": 7, "productId": 1}
    answer = client.post("/purchase", json=body, headers={"Idempotency-Key": "k"})
    if key not in KEYS.attempts or answer.status_code != 200:  # a hash that is not read now
        assert (answer.status_code, answer.json.get("executed")) == (503, False)
        for name in watched:
            if name == KEYS.outbox and name != key:
                # A stream remembers that it had more; its entries are what counts.
                assert [entry[0] for entry in stock.first.read_outbox(9)] == [b"1-0"]
            else:
                assert name == key or stock.raw_client.dump(name) == held[name], name
        stock.client.delete(key)
        if held[key] is not None:
            stock.raw_client.restore(key, 0, held[key])
    assert stock.claim(7, 1, 1, "k", "a").outcome in (b"accepted", b"replayed")


def test_what_surely_did_nothing_says_so(app, buy):
    stock.client.delete(KEYS.generation)
    answer = buy(1)
    assert (answer.status_code, answer.json["executed"]) == (503, False)
    stock.thread_line.breaker.waited_in_vain()
    with pytest.raises(Unavailable) as refused:
        stock.claim(1, 1, 1, None, "a")
    stock.thread_line.breaker.answered()
    assert refused.value.executed is False
