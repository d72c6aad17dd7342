"""Shards lend each other stock: the scripts on a real server, under the tags of several shards."""

import asyncio
import math
import random
import statistics
from collections import Counter
from dataclasses import replace
from itertools import count

import pytest
import redis
from drills import often

from app.config import NO_LIMIT
from app.problems import Unavailable
from app.stock import dealing
from app.stock.claims import Request
from app.stock.dealing import Ask
from app.stock.place import place
from app.stock.pulls import KEYS_OF, LoopPulls, ThreadPulls, carry_out, names_of
from app.stock.servers import Server
from app.stock.shard import Shard
from app.stock.shards import Part

SALE = "5a1e"
PRODUCT = 1
TERMS = {"max": 10, "cap": "", "opens": "", "closes": "", "pause": 0, "price": "1999 EUR",
         "hold": "", "version": 1}  # fmt: skip
COUNTERS = {"moved": 0, "accepted": 0, "claimed": 0, "settled": 0, "settled_units": 0,
            "persisted": 0, "held": 0}  # fmt: skip
# For shoppers who ask again until their answer is final.
MANY_TRIES = {"purchase_user_limit": NO_LIMIT, "purchase_address_limit": NO_LIMIT}


class Sale:
    """So many shards on one server, in a database of its own, with a product."""

    def __init__(self, url: str, settings, shards: int) -> None:
        self.client = redis.Redis.from_url(url, db=8)
        self.client.flushdb()
        server = Server(f"{url}?db=8")
        self.shards = [
            Shard(Part(number, shards), server, settings, lambda: None) for number in range(shards)
        ]
        self.names = names_of(self.shards, SALE)
        for shard, name in zip(self.shards, self.names, strict=True):
            self.client.set(shard.keys.generation, name)
            figures = {**TERMS, **COUNTERS, "free": 0}
            self.client.hset(shard.keys.product(PRODUCT), mapping=figures)

    def put(self, *units: int) -> None:
        """Put units on sale in each of the first shards."""
        for shard, free in zip(self.shards, units, strict=False):
            for figure in ("free", "moved"):
                self.client.hincrby(shard.keys.product(PRODUCT), figure, free)

    def free(self) -> list[int]:
        keys = [shard.keys.product(PRODUCT) for shard in self.shards]
        return [int(self.client.hget(key, "free")) for key in keys]

    def hang_up(self) -> None:
        """Let go of the event loop's connections: of a thousand rushes Redis would take no more."""
        for shard in self.shards:
            if shard.loop_line._channel:
                shard.loop_line._channel.abort()

    def run(self, shard: int, script: str, *args, source: int = 0):
        ask = Ask(shard, script, PRODUCT, args, source=source)
        one = self.shards[shard]
        return one.run(script, KEYS_OF[script](one.keys, ask), list(args))

    def do(self, steps):
        return carry_out(self.shards, steps)

    def claim(self, shard: int, user: int, quantity: int = 1, found: str | None = None):
        request = Request(user, PRODUCT, quantity, None, "192.0.2.1", found=found)
        return self.shards[shard].thread_line.claim(request)


@pytest.fixture
def sale(servers, settings):
    sales = []

    def make(shards: int, *units: int, **changes) -> Sale:
        sales.append(Sale(servers[0].url, replace(settings, **changes), shards))
        sales[-1].put(*units)
        return sales[-1]

    yield make
    for each in sales:
        each.client.flushdb()
        each.client.close()


def test_half_of_what_is_free_is_lent_or_what_is_lacking(sale):
    one = sale(2, 9)
    assert one.run(0, "take", one.names[0], PRODUCT, 1, 1) == ["taken", 1, 5]
    assert one.run(0, "take", one.names[0], PRODUCT, 1, 3) == ["taken", 2, 3]
    assert one.run(0, "take", one.names[0], PRODUCT, 1, 7) == ["taken", 3, 1]
    assert one.run(0, "take", one.names[0], PRODUCT, 1, 1) == ["none", 0, 0]
    assert one.client.hgetall(one.shards[0].keys.lent(PRODUCT)) == {b"sent.1": b"9"}


def test_an_entry_is_given_once_and_to_the_right_sale(sale):
    one = sale(3, 4)
    one.run(0, "take", one.names[0], PRODUCT, 1, 1)
    give = (0, 1, 2)
    assert one.run(1, "give", "another/3/1", *give) == "unprepared"
    assert one.run(2, "give", one.names[1], *give) == "unprepared"
    assert one.run(1, "give", one.names[1], *give) == "given"
    assert one.run(1, "give", one.names[1], *give) == "repeated"
    assert one.free() == [2, 2, 0]
    assert one.client.hgetall(one.shards[1].keys.lent(PRODUCT)) == {b"recv.0": b"2"}
    # Entries of another source have bits of their own.
    one.put(0, 0, 2)
    one.run(2, "take", one.names[2], PRODUCT, 1, 2)
    assert one.run(1, "give", one.names[1], 2, 1, 2, source=2) == "given"
    assert one.free() == [2, 4, 0]


def test_what_a_dead_puller_left_is_given_by_anybody(sale):
    one = sale(2, 6)
    one.run(0, "take", one.names[0], PRODUCT, 1, 1)
    assert one.do(dealing.finish(one.names, 0)) == 0
    assert one.do(dealing.finish(one.names, 0, late_ms=0)) == 1
    assert one.do(dealing.finish(one.names, 0, late_ms=0)) == 0
    assert one.free() == [3, 3]
    assert one.client.xlen(one.shards[0].keys.sent) == 0


def test_a_dead_pullers_unit_is_found_by_the_next_claim(sale):
    one = sale(3, 1)
    one.run(0, "take", one.names[0], PRODUCT, 1, 1)
    pulled = one.do(dealing.pull(one.names, 2, PRODUCT, 1, gather=True))
    assert pulled.found is None
    assert one.free() == [0, 0, 1]


def test_a_dry_shard_gets_half_of_the_richest(sale):
    one = sale(3, 0, 3, 8)
    pulled = one.do(dealing.pull(one.names, 0, PRODUCT, 1, gather=True))
    assert pulled.found is None
    assert one.free() == [4, 3, 4]


def test_a_large_order_gathers_from_several(sale):
    one = sale(4, 1, 2, 2, 1)
    one.do(dealing.pull(one.names, 0, PRODUCT, 5, gather=True))
    assert one.free() == [5, 0, 0, 1]
    # Once; then it is told how many there are, and less than it wants.
    pulled = one.do(dealing.pull(one.names, 1, PRODUCT, 6, gather=False))
    assert pulled.found == 5
    assert one.do(dealing.pull(one.names, 1, PRODUCT, 7, gather=True)).found == 6


def test_a_claim_is_dry_then_sold_out_and_sealed_until_it_is_unsealed(sale):
    one = sale(3, 0, 0, 1)
    assert one.claim(0, 1).outcome == b"dry"
    assert one.claim(2, 2).outcome == b"accepted"
    pulled = one.do(dealing.pull(one.names, 0, PRODUCT, 1, gather=True))
    assert (pulled.found, pulled.final) == (0, True)
    for shard in range(3):
        assert one.claim(shard, 3 + shard)[:2] == (b"sold_out", 0)
    one.put(1)
    assert one.claim(1, 9).outcome == b"sold_out"
    one.do(dealing.unseal(3, PRODUCT))
    assert one.claim(1, 9).outcome == b"dry"


def test_a_seal_comes_too_late_where_it_was_unsealed_meanwhile(sale):
    one = sale(2)
    steps = dealing.pull(one.names, 0, PRODUCT, 1, gather=True)
    step = next(steps)
    while step[0].script != "seal":
        step = steps.send([one.run(ask.shard, ask.script, *ask.args) for ask in step])
    one.do(dealing.unseal(2, PRODUCT))
    assert [one.run(ask.shard, ask.script, *ask.args) for ask in step] == [0, 0]
    assert one.claim(0, 1).outcome == b"dry"


def test_a_dry_claim_counts_nothing_and_a_refused_one_does(sale):
    one = sale(2)
    before = one.client.hgetall(one.shards[0].keys.product(PRODUCT))
    for _ in range(9):
        assert one.claim(0, 1).outcome == b"dry"
    assert one.client.hgetall(one.shards[0].keys.product(PRODUCT)) == before
    refused = one.claim(0, 1, found="0")
    assert (refused.outcome, refused.attempts_left) == (b"sold_out", 4)


def test_a_refusal_says_where_more_may_be(sale):
    one = sale(2)
    assert one.claim(0, 1, found="0 away")[0::4] == (b"sold_out", b"away")
    assert one.claim(0, 1, 4, found="3")[:2] == (b"insufficient", 3)
    one.client.hset(one.shards[0].keys.product(PRODUCT), "held", 1)
    assert one.claim(0, 1, found="0 away").text == b"held away"


def test_a_shard_that_is_closed_is_out_of_reach(sale):
    one = sale(3, 0, 0, 4)
    one.client.delete(one.shards[2].keys.generation)
    pulled = one.do(dealing.pull(one.names, 0, PRODUCT, 1, gather=True))
    assert (pulled.found, pulled.final) == (0, False)
    assert one.claim(1, 1).text == b"away"


def test_threads_buy_what_another_shard_has(sale):
    one = sale(4, 0, 0, 0, 3)
    pulls = ThreadPulls(one.shards)

    def buy(shard: int, user: int, quantity: int = 1):
        request = Request(user, PRODUCT, quantity, None, "192.0.2.1")
        line = one.shards[shard]
        return pulls.claim_again(line, request, line.thread_line.claim(request))

    assert buy(0, 1, 4)[:2] == (b"insufficient", 3)
    assert buy(0, 1).outcome == b"accepted"
    assert buy(1, 2, 2).outcome == b"accepted"
    assert buy(2, 3).outcome == b"sold_out"
    assert sum(one.free()) == 0


async def outcome_of(sale: Sale, user: int) -> bytes:
    """Have a shopper buy one by the event loop's line, and ask again for as long as it is unknown.

    On a machine that is busy with other things Redis may not answer in time: the same key tells. Or
    a connection is lost so, and what its shard has is out of reach: the refusal says so.
    """
    line = sale.shards[place(user, len(sale.shards)).shard].loop_line
    while True:
        try:
            claim = await line.claim(Request(user, PRODUCT, 1, "k", f"of {user}"))
            if b"away" not in claim.text:
                return b"accepted" if claim.outcome == b"replayed" else claim.outcome
        except Unavailable:
            pass
        await asyncio.sleep(0.05)


async def crowd(sales: list[Sale], seed: int, shoppers: int) -> list[bytes]:
    """Have shoppers buy one each at once, by the event loops' lines of so many processes."""
    chance = random.Random(seed)
    for each in sales:
        LoopPulls(each.shards)

    async def buy(user: int) -> bytes:
        await asyncio.sleep(chance.random() * 0.05)
        return await outcome_of(sales[user % len(sales)], user)

    told = await asyncio.gather(*[buy(user) for user in range(shoppers)])
    for each in sales:
        each.hang_up()
    return told


@pytest.mark.parametrize(
    "times", [6, pytest.param(often(50, 1000), marks=pytest.mark.drill)], ids=["few", "many"]
)
def test_a_rush_of_200_for_100_units_on_24_shards_sells_exactly_100(sale, settings, times):
    for seed in range(times):
        one, other = (sale(24, **MANY_TRIES) for _ in range(2))
        one.put(*[shard.part.deals(100, seed) for shard in one.shards])
        told = Counter(asyncio.run(crowd([one, other], seed, 200)))
        assert told == {b"accepted": 100, b"sold_out": 100}
        assert sum(one.free()) == 0


async def wait_for_units(sales: list[Sale], seed: int, units: int) -> list[float]:
    """Have shoppers ask without a pause, and put units on sale, each once the one before is sold.

    They come to shards that have no shoppers, and nobody is told. Returns after how many seconds
    each was sold.
    """
    chance, loop = random.Random(seed), asyncio.get_running_loop()
    users = (user for user in count(1) if place(user, 24).shard >= 12)
    for each in sales:
        LoopPulls(each.shards)
    put_at, sold = math.inf, asyncio.Event()

    async def shop(sale: Sale) -> None:
        while not putting.done():
            asked_at = loop.time()
            if await outcome_of(sale, next(users)) == b"accepted":
                sold.set()
            elif asked_at > put_at + 1:
                assert not sum(sale.free()), "refused, with a unit in reach for more than a second"
            await asyncio.sleep(0.01)

    async def put() -> list[float]:
        nonlocal put_at
        seconds = []
        for _ in range(units):
            await asyncio.sleep(chance.random() * 0.5)
            sold.clear()
            at = chance.randrange(12)
            sales[0].put(*[int(number == at) for number in range(24)])
            # In reach from now on: many commands, each of which waits for the disk, lie behind.
            put_at = loop.time()
            await sold.wait()
            seconds.append(loop.time() - put_at)
            put_at = math.inf
        return seconds

    putting = asyncio.create_task(put())
    await asyncio.gather(*[shop(sales[number % 2]) for number in range(8)])
    return await putting


def test_a_unit_in_reach_is_refused_to_nobody_for_longer_than_a_second(sale):
    one, other = (sale(24, **MANY_TRIES) for _ in range(2))
    seconds = asyncio.run(wait_for_units([one, other], 1, often(6, 300)))
    print(f"sold after {statistics.median(seconds):.2f} s, at most {max(seconds):.2f} s")
    assert sum(one.free()) == 0
