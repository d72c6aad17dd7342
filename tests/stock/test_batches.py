"""A batch of claims does what the same claims do one by one; one at fault harms no other."""

import asyncio
import random
from collections import defaultdict
from dataclasses import replace
from importlib import resources
from itertools import count

import pytest
import redis
from counts import commandstats
from drills import often
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from app.config import NO_LIMIT, RateLimit, load_settings
from app.extensions import stock
from app.run.embedded import RedisServer
from app.stock.claims import MOST_AT_ONCE, ClaimScript, Request
from app.stock.keys import KEYS
from app.stock.loop_line import LoopLine
from app.stock.place import place
from app.stock.shards import WHOLE, Part
from app.watch.telemetry import Meter

CLOCK = "test:clock"
MINUTE = 60_000
USERS = [1, 2, 127, 128, 9_007_199_254_740_991, "007", "a", "a:b", "auth0|7"]
REQUESTS = st.builds(
    Request,
    user=st.sampled_from(USERS),
    product_id=st.sampled_from([1, 1, 1, 2, 3, 99]),
    quantity=st.sampled_from([1, 1, 1, 2, 3, 50]),
    key=st.sampled_from([None, None, "k", "b:k"]),
    address=st.sampled_from(["192.0.2.1", "192.0.2.2", "198.51.100.7", "2001:db8::/64"]),
    expected_cents=st.sampled_from([None, None, None, 1999, 5]),
    reference=st.sampled_from([None, None, "cart-7"]),
    # Of a sale of several shards: what the others were found to have.
    found=st.sampled_from([None, None, "0", "0 away", "3"]),
    dry_since=st.just(0.0),
)
BATCHES = st.lists(
    st.tuples(
        # How much later the batch comes: the same moment, a slot of a window, a turn.
        st.sampled_from([0, 1, 20_000, 45_000, 125_000]),
        st.lists(REQUESTS, min_size=1, max_size=MOST_AT_ONCE),
    ),
    min_size=1,
    max_size=4,
)
PRODUCTS = st.fixed_dictionaries(
    {
        "free": st.sampled_from([0, 1, 2, 5, 40]),
        "opens": st.sampled_from(["", "", "", 30_000]),
        "closes": st.sampled_from(["", "", "", 30_000]),
        "pause": st.sampled_from([0, 0, 0, 1]),
        "cap": st.sampled_from(["", 1, 3, 10]),
        "max": st.sampled_from([2, 10]),
        "price": st.just("1999 EUR"),
        "hold": st.sampled_from(["", "", 300]),
        "held": st.sampled_from([0, 0, 2]),
        # Until so long after the start, as in a sale of several shards.
        "sealed": st.sampled_from([None, None, 500, 30_000]),
        "moved": st.just(0),
        "accepted": st.just(0),
        "claimed": st.just(0),
    }
)
LIMITS = st.fixed_dictionaries(
    {
        "purchase_user_limit": st.sampled_from([NO_LIMIT, RateLimit(2, MINUTE), RateLimit(5, 500)]),
        "purchase_address_limit": st.sampled_from([NO_LIMIT, RateLimit(6, MINUTE)]),
        "purchase_network_limit": st.sampled_from([NO_LIMIT, RateLimit(9, MINUTE)]),
        "purchase_address_units": st.sampled_from([0, 0, 4]),
        "outbox_limit": st.sampled_from([1_000_000, 6]),
    }
)
BRAKES = st.sampled_from([None, None, None, " * ", " 2 ", " 99 "])
PARTS = st.sampled_from([WHOLE, WHOLE, Part(1, 6)])


def of_part(part, batches):
    """Have other shoppers ask, who belong there: a field of one's own is one's own in one shard."""
    if part == WHOLE:
        return batches
    crowd = (user for n in count(1) for user in (n, f"t{n}") if place(user, 6).shard == part.shard)
    theirs = defaultdict(lambda: next(crowd))
    return [(later, [r._replace(user=theirs[r.user]) for r in of]) for later, of in batches]


# What chance alone may leave out: so many buy that the outbox, or an address, has enough.
NONE = {
    "purchase_user_limit": NO_LIMIT,
    "purchase_address_limit": NO_LIMIT,
    "purchase_network_limit": NO_LIMIT,
}
PLENTY = {"free": 40, "opens": "", "closes": "", "pause": 0, "cap": "", "max": 10,
          "price": "1999 EUR", "hold": "", "held": 0, "sealed": None, "moved": 0, "accepted": 0,
          "claimed": 0}  # fmt: skip
CROWD = [Request(user, 1, 1, None, "192.0.2.1") for user in range(1, 9)]
AGAIN = [Request(1, 1, units, "k", "192.0.2.1") for units in (1, 1, 2)]


class Bench:
    """A database of its own, with a clock that the test sets."""

    START = 1_700_000_000_000

    def __init__(self, url: str) -> None:
        self.redis = redis.Redis.from_url(url, db=9)
        script = (resources.files("app.stock.lua") / "claim.lua").read_text()
        told = script.replace("redis.call('TIME')", f"redis.call('HMGET', '{CLOCK}', 's', 'us')")
        assert told != script
        self.text = told
        self.settings = load_settings({})

    def decide(self, script: ClaimScript, *requests: Request):
        connection = self.redis.connection_pool.get_connection()
        try:
            connection.send_packed_command((script.load, script.command(*requests)))
            connection.read_response()
            return connection.read_response()
        finally:
            self.redis.connection_pool.release(connection)

    def run(self, limits, products, brakes, batches, together, part=WHOLE):
        """Return what was answered, and what then stands in Redis, after each batch."""
        script = ClaimScript(self.text, replace(self.settings, **limits), part)
        keys = script.keys
        self.redis.flushdb()
        self.redis.set(keys.generation, part.generation("sale"))
        if brakes:
            self.redis.set(keys.brakes, brakes)
        for number, product in enumerate(products, 1):
            for edge in ("opens", "closes", "sealed"):
                if product.get(edge) not in ("", None):
                    product = product | {edge: self.START + product[edge]}
            told = {name: value for name, value in product.items() if value is not None}
            self.redis.hset(keys.product(number), mapping=told)
        now, told = self.START, []
        for later, requests in batches:
            now += later
            self.redis.hset(CLOCK, mapping={"s": now // 1000, "us": now % 1000 * 1000})
            if together:
                answers = self.decide(script, *requests)
            else:
                answers = [self.decide(script, request)[0] for request in requests]
            told.append((answers, self.held()))
        return told

    def held(self) -> dict:
        found = {}
        for name in self.redis.scan_iter(count=1000):
            match self.redis.type(name):
                case b"hash":
                    found[name] = self.redis.hgetall(name)
                case b"stream":
                    found[name] = self.redis.xrange(name)
                case b"zset":
                    found[name] = self.redis.zrange(name, 0, -1, withscores=True)
                case _:
                    found[name] = self.redis.get(name)
        return found


@pytest.fixture
def bench(servers):
    bench = Bench(servers[0].url)
    fsync = bench.redis.config_get("appendfsync")["appendfsync"]
    # No machine dies here, and waiting for the disk would take most of the time.
    bench.redis.config_set("appendfsync", "no")
    yield bench
    bench.redis.flushdb()
    bench.redis.config_set("appendfsync", fsync)
    bench.redis.close()


@pytest.mark.parametrize(
    "examples",
    [150, pytest.param(often(1500, 10_000), marks=pytest.mark.drill)],
    ids=["few", "many"],
)
def test_a_batch_is_its_claims_one_by_one(bench, examples):
    outcomes, remarks = set(), set()

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(LIMITS, st.tuples(PRODUCTS, PRODUCTS, PRODUCTS), BRAKES, BATCHES, PARTS)
    @example({**NONE, "outbox_limit": 6}, (PLENTY,), None, [(0, AGAIN), (1, CROWD)], WHOLE)
    @example(NONE, ({**PLENTY, "free": 1},), None, [(0, CROWD)], Part(1, 6))
    @example({**NONE, "purchase_address_units": 4}, (PLENTY,), None, [(0, CROWD)], WHOLE)
    def alike(limits, products, brakes, batches, part):
        batches = of_part(part, batches)
        alone = bench.run(limits, products, brakes, batches, False, part)
        together = bench.run(limits, products, brakes, batches, True, part)
        for one, other in zip(alone, together, strict=True):
            assert other == one
        outcomes.update(answer[0] for answers, _ in together for answer in answers)
        remarks.update(answer[4] for answers, _ in together for answer in answers)

    alike()
    # The examples are worth something: they meet every outcome but those of other tests.
    assert outcomes >= {
        b"accepted", b"replayed", b"mismatched", b"limited", b"limited_address", b"limited_network",
        b"unknown", b"too_many", b"ended", b"paused", b"not_open", b"price_changed", b"capped",
        b"capped_address", b"sold_out", b"insufficient", b"overloaded", b"dry",
    }  # fmt: skip
    assert remarks >= {b"held", b"away", b"held away"}


# What a batch may be decided wrongly by, though each claim alone is decided well.
PLANTED = {
    "one id for a batch": ("'INCRBY', KEYS[7], #accepted", "'INCRBY', KEYS[7], 1"),
    "INCR": ("try('INCRBY', KEYS[7], #accepted * SHARDS)", "try('INCR', KEYS[7])"),
    "the same id": ("      id = id + SHARDS\n", ""),
    "free as at first": ("product.free - quantity, product", "product.free, product"),
    "sold units of the last": ("product.claimed + quantity, true", "quantity, true"),
    "cap as at first": ("= bought + quantity", "= bought"),
    "rate as at first": ("attempts[by_user], noted[by_user] = user_record, true",
                         "noted[by_user] = true"),
    "keys as at first": ("records[record_name] = {", "records[''] = {"),
    "refused once": ("(outcomes[outcome] or 0) + 1", "1"),
}  # fmt: skip


@pytest.mark.parametrize(("right", "wrong"), PLANTED.values(), ids=PLANTED)
def test_a_planted_fault_of_batches_is_found(bench, right, wrong):
    product = {"free": 9, "opens": "", "closes": "", "pause": 0, "cap": 4, "max": 10,
               "price": "1999 EUR", "moved": 9, "accepted": 0, "claimed": 0}  # fmt: skip
    limits = {"purchase_user_limit": RateLimit(3, MINUTE)}
    batch = [
        Request(user, 1, units, key, f"192.0.2.{user}")
        for user, units, key in [
            (1, 2, "k"), (1, 2, "k"), (1, 2, None), (1, 1, None), (1, 1, None), (2, 3, None),
            (3, 1, None), (4, 4, None), (5, 1, None), (6, 1, None), (7, 1, None),
        ]
    ]  # fmt: skip
    given = limits, [product], None, [(0, batch)]
    alone = bench.run(*given, together=False)
    assert bench.run(*given, together=True) == alone
    assert bench.text.count(right) == 1
    bench.text = bench.text.replace(right, wrong)
    assert bench.run(*given, together=True) != alone


def outcomes_of(bench, *requests, **limits):
    script = ClaimScript(bench.text, replace(bench.settings, **limits))
    return [answer[0].decode() for answer in bench.decide(script, *requests)]


@pytest.fixture
def sale(bench):
    """Two products on sale, 100 units each, in the bench's database."""
    bench.redis.flushdb()
    bench.redis.hset(CLOCK, mapping={"s": 1_700_000_000, "us": 0})
    bench.redis.set(KEYS.generation, "sale")
    for number in (1, 2):
        bench.redis.hset(
            KEYS.product(number),
            mapping={"free": 100, "max": 10, "cap": 10, "pause": 0, "price": "1999 EUR",
                     "moved": 100, "accepted": 0, "claimed": 0},
        )  # fmt: skip
    return bench


def test_what_comes_later_in_a_batch_sees_what_came_before(sale):
    sale.redis.hset(KEYS.product(1), "free", 3)
    told = outcomes_of(
        sale,
        Request(7, 1, 1, "k", "192.0.2.1"),
        Request(7, 1, 1, "k", "192.0.2.1"),
        Request(7, 1, 2, "k", "192.0.2.1"),
        Request(7, 1, 9, None, "192.0.2.1"),
        Request("7.", 1, 2, "k", "192.0.2.1"),
        Request(8, 1, 1, None, "192.0.2.1"),
        Request(7, 2, 10, None, "192.0.2.1"),
        Request(7, 2, 1, None, "192.0.2.1"),
    )
    assert told == [
        "accepted", "replayed", "mismatched", "insufficient", "accepted", "sold_out", "accepted",
        "capped",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("spoil", "harmed"),
    [
        (lambda r: (r.delete(KEYS.product(2)), r.set(KEYS.product(2), "x")), [1]),
        (lambda r: r.hdel(KEYS.product(2), "price"), [1]),
        (lambda r: r.hset(KEYS.product(2), "accepted", "many"), [1]),
        (lambda r: r.set(KEYS.bought(1, 3000)[0], "x"), [2]),
        (lambda r: r.hset(*KEYS.bought(1, 3000), "many"), [2]),
        (lambda r: r.set(KEYS.idempotency(4000, "k")[0], "x"), [3]),
        (lambda r: r.hset(*KEYS.idempotency(4000, "k"), "nonsense"), [3]),
        (lambda r: r.set(KEYS.former_idempotency(4000, "k"), "nonsense"), [3]),
        (lambda r: r.set(KEYS.queued, "x"), [0, 1, 2, 3, 5]),
        (lambda r: r.set(KEYS.outbox, "x"), [0, 1, 2, 3, 5]),
        (lambda r: r.set(KEYS.order_ids, "x"), [0, 1, 2, 3, 5]),
        # A stream that holds a higher id than the next one.
        (lambda r: r.xadd(KEYS.outbox, {"order": "x"}, "4-0"), [0, 1, 2, 3, 5]),
        (lambda r: r.xadd(KEYS.outbox, {"order": "x"}, "3-0"), [0, 1, 2, 3, 5]),
    ],
    ids=[
        "product", "price", "figure", "bought", "units", "keys", "record", "former", "queued",
        "outbox", "ids", "higher id", "high id",
    ],
)  # fmt: skip
@pytest.mark.parametrize("address_units", [0, 50])
def test_what_is_wrong_in_redis_harms_its_own_claim(sale, spoil, harmed, address_units):
    batch = [
        Request(1000, 1, 1, None, "192.0.2.1"),
        Request(2000, 2, 1, "k", "192.0.2.1"),
        Request(3000, 1, 2, "k", "192.0.2.1"),
        Request(4000, 1, 1, "k", "192.0.2.1", None, "cart"),
        Request(5000, 99, 1, None, "192.0.2.1"),
        Request("text", 1, 1, None, "192.0.2.1"),
    ]
    spoil(sale.redis)
    before = sale.held()
    told = outcomes_of(sale, *batch, purchase_address_units=address_units)
    expected = ["accepted"] * 4 + ["unknown", "accepted"]
    for number in harmed:
        expected[number] = "undone"
    assert told == expected
    after = sale.held()
    if len(harmed) > 1:
        # Nothing is left of any: only attempts and the count of the refusal are new.
        assert {name for name in after if before.get(name) != after[name]} <= {
            name.encode() for name in (*KEYS.attempts, KEYS.refused, KEYS.order_ids)
        }
        assert after.get(KEYS.order_ids.encode(), b"0") in (b"0", b"x")
    else:
        taken = [request for request, how in zip(batch, told, strict=True) if how == "accepted"]
        assert len(after[KEYS.outbox.encode()]) == len(taken)
        assert after[KEYS.order_ids.encode()] == b"%d" % len(taken)
        free = int(after[KEYS.product(1).encode()][b"free"])
        assert free == 100 - sum(r.quantity for r in taken if r.product_id == 1)


def test_records_of_the_former_version_are_read(sale):
    sale.redis.set(KEYS.former_idempotency(7, "k"), "3 1 2")
    script = ClaimScript(sale.text, sale.settings)
    ask = [Request(7, 1, 2, "k", "a"), Request(7, 1, 1, "k", "a"), Request("7-", 1, 2, "k", "a")]
    answers = sale.decide(script, *ask)
    assert answers[0] == [b"replayed", 3, -1, 0, b""]
    assert [answer[0] for answer in answers[1:]] == [b"mismatched", b"accepted"]


def test_refusals_move_nothing_in_the_log(app, buy, monkeypatch):
    """A whole batch of them, of every kind, between others."""
    # Once somebody has bought, a thread of this process reports its figures each second.
    monkeypatch.setattr(Meter, "flush", lambda meter: None)
    for user in range(1, 11):
        buy(user, quantity=10)
    script = stock.thread_line.script
    connection = stock.raw_client.connection_pool.get_connection()
    try:
        connection.send_packed_command((script.load,))
        connection.read_response()
        before = stock.client.info("persistence")["aof_current_size"]
        commands = [
            script.command(
                *[
                    Request(user, product, units, None, f"192.0.2.{user % 250}")
                    for user in range(start, start + 5)
                    for product, units in 2 * [(1, 1), (2, 1), (1, 99)]
                ]
            )
            for start in range(100, 200, 5)
        ]
        connection.send_packed_command(commands)
        told = {claim[0] for _ in commands for claim in connection.read_response()}
    finally:
        stock.raw_client.connection_pool.release(connection)
    assert told == {b"sold_out", b"unknown", b"too_many", b"limited"}
    assert stock.client.info("persistence")["aof_current_size"] == before


def test_a_batch_costs_few_commands(app):
    """What is the same for all of a batch is read and written once."""
    stock.client.config_set("appendfsync", "no")
    script = stock.thread_line.script
    connection = stock.raw_client.connection_pool.get_connection()
    try:
        for start in (1, 1001):
            requests = [
                Request(user, 1, 1, None, f"192.0.2.{user % 32}")
                for user in range(start, start + MOST_AT_ONCE)
            ]
            before = commandstats()
            connection.send_packed_command((script.load, script.command(*requests)))
            connection.read_response()
            assert {answer[0] for answer in connection.read_response()} == {b"accepted"}
            after = commandstats()
    finally:
        stock.raw_client.connection_pool.release(connection)
        stock.client.config_set("appendfsync", "always")
    cost = {name: after[name] - before.get(name, 0) for name in after}
    once = {"evalsha": 1, "time": 1, "mget": 1, "xlen": 1, "incrby": 1, "zadd": 1}
    each = {"xadd": MOST_AT_ONCE, "hincrby": MOST_AT_ONCE}
    assert {name: cost[name] for name in once | each} == once | each
    # The product's, this turn's attempts and the last one's; then the product and the attempts.
    assert cost["hmget"] == 3
    assert cost["hset"] <= 3


def test_claims_of_one_turn_go_together(app):
    line = LoopLine(stock.first.server, stock.loop_line.line.script, lambda: None)

    async def rush(users):
        return await asyncio.gather(
            *(line.claim(Request(user, 1, 1, None, f"192.0.2.{user % 200}")) for user in users)
        )

    async def whole():
        await line.claim(Request(1, 1, 1, None, "192.0.2.1"))
        before = commandstats()["evalsha"]
        claims = await rush(range(2, 2 + 3 * MOST_AT_ONCE))
        return claims, commandstats()["evalsha"] - before

    claims, calls = asyncio.run(whole())
    assert [claim.detail for claim in claims] == list(range(2, 2 + len(claims)))
    assert calls == 3


def test_one_that_can_t_be_told_keeps_nobody_waiting(app, caplog):
    line = LoopLine(stock.first.server, stock.loop_line.line.script, lambda: None)

    async def whole():
        done = asyncio.get_running_loop().create_future()
        line.ask(Request(1, 1, 1, None, "a"), lambda _: 1 / 0)
        line.ask(Request(2, 1, 1, None, "a"), done.set_result)
        first = await done
        return first, await line.claim(Request(3, 1, 1, None, "a"))

    first, second = asyncio.run(whole())
    assert (first.detail, second.detail) == (2, 3)
    assert "not answered" in caplog.text


def test_a_server_killed_in_a_batch_has_all_of_it_or_nothing(tmp_path):
    server = RedisServer(tmp_path)
    server.start()
    script = ClaimScript(
        (resources.files("app.stock.lua") / "claim.lua").read_text(),
        replace(load_settings({}), purchase_address_limit=NO_LIMIT),
    )
    choose = random.Random(7)
    free, answered, sizes = 10_000_000, 0, {0}
    try:
        client = redis.Redis.from_url(server.url)
        client.set(KEYS.generation, "sale")
        client.hset(
            KEYS.product(1),
            mapping={"free": free, "max": 10, "cap": 10, "pause": 0, "price": "1 USD",
                     "accepted": 0, "claimed": 0},
        )  # fmt: skip
        for round_ in range(3):
            connection = redis.Redis.from_url(server.url).connection_pool.get_connection()
            connection.send_packed_command((script.load,))
            connection.read_response()
            first = (round_ + 1) * 10**6
            batches = [
                [Request(first + 100 * n + i, 1, 1, "k", "a") for i in range(MOST_AT_ONCE)]
                for n in range(300)
            ]
            connection.send_packed_command([script.command(*batch) for batch in batches])
            for _ in range(choose.randrange(20, 120)):
                answered += len(connection.read_response())
            server.process.kill()
            server.process.wait()
            connection.disconnect()
            server.start()
            client = redis.Redis.from_url(server.url)
            orders = client.xlen(KEYS.outbox)
            assert orders >= answered
            assert orders % MOST_AT_ONCE == 0
            sizes.add(orders)
            figures = client.hgetall(KEYS.product(1))
            assert int(figures[b"free"]) == free - orders
            assert int(figures[b"accepted"]) == int(figures[b"claimed"]) == orders
            assert int(client.get(KEYS.order_ids)) == orders == client.zcard(KEYS.queued)
            records = sum(client.hlen(name) for name in client.scan_iter("sale:{0}:keys:*", 1000))
            assert records == orders
            answered = orders
    finally:
        server.stop()
    assert len(sizes) == 4
