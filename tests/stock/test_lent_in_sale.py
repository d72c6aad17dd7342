"""A sale of six shards that lend: shoppers, restocks, corrections, the ledger see one stock."""

from collections import Counter

import pytest
from waiting import wait_until

from app.audit import CLI
from app.books import ledger, recovery
from app.config import NO_LIMIT
from app.extensions import stock
from app.generation import on_record
from app.orders import cancelling
from app.orders.drain import drain_batch
from app.problems import Conflict
from app.products import movements
from app.stock.dealing import LATE_MS


@pytest.fixture
def six(make_app):
    app = make_app(shards=6, purchase_user_limit=NO_LIMIT, purchase_address_limit=NO_LIMIT)
    with app.app_context():
        yield app


def buy(user, quantity: int = 1):
    return stock.claim(user, 1, quantity, f"k{user}", "a")


def outcomes(users, quantity: int = 1) -> Counter:
    return Counter(buy(user, quantity).outcome.decode() for user in users)


def drained() -> None:
    while stock.waiting():
        drain_batch("test", "test")


def proven() -> ledger.ProductCheck:
    check = ledger.check(rows=True)
    assert check.ok, (check.problems, check.products[1].problems)
    return check.products[1]


def free() -> list[int]:
    return [shard.view([1]).products[1]["free"] for shard in stock.shards]


def test_the_last_unit_is_sold_wherever_it_lies(six):
    assert outcomes(range(1, 151)) == {"accepted": 100, "sold_out": 50}
    product = proven()
    assert (product.queued, product.free, product.in_transit) == (100, 0, 0)
    drained()
    assert (proven().stored, sum(free())) == (100, 0)


def test_what_is_restocked_or_given_back_can_be_bought_at_once_by_anybody(six):
    outcomes(range(1, 101))
    assert outcomes(range(101, 107)) == {"sold_out": 6}
    movements.restock(1, 1, None, CLI)
    assert outcomes(range(201, 203)) == {"accepted": 1, "sold_out": 1}
    drained()
    order = stock.claim(1, 1, 1, "k1", "a").detail
    cancelling.cancel(order, "changed their mind", CLI)
    assert outcomes(range(301, 303)) == {"accepted": 1, "sold_out": 1}
    proven()


def test_an_order_larger_than_any_shard_has(six):
    assert movements.correct(1, -88, "stolen", CLI) == 12
    assert buy(1, 9).outcome == b"accepted"
    told = buy(2, 5)
    assert (told.outcome, told.detail) == (b"insufficient", 3)
    assert buy(3, 3).outcome == b"accepted"
    assert buy(4).outcome == b"sold_out"
    assert proven().free == 0


def test_a_correction_takes_from_all_shards_or_from_none(six):
    before = free()
    with pytest.raises(Conflict, match="Only 100"):
        movements.correct(1, -101, "miscounted", CLI)
    assert sum(free()) == sum(before)
    assert movements.correct(1, -100, "miscounted", CLI) == 0
    assert outcomes(range(1, 4)) == {"sold_out": 3}
    assert proven().free == 0


def test_the_sweeper_gives_what_a_dead_puller_took(six):
    source = stock.shards[2]
    names = [shard.named(on_record()) for shard in stock.shards]
    keys = source.keys
    where = [keys.generation, keys.product(1), keys.lent(1), keys.sends, keys.sent]
    outcome, _, units = source.run("take", where, [names[2], 1, 5, 1])
    assert outcome == "taken"
    assert proven().in_transit == units
    wait_until(lambda: stock.finish_lent(on_record()), LATE_MS / 1000 + 5, "the entry to be late")
    product = proven()
    assert (product.in_transit, product.free) == (0, 100)


def test_the_ledger_tells_of_units_that_come_from_nowhere(six):
    keys = stock.shards[3].keys
    stock.client.hincrby(keys.lent(1), "recv.0", 2)
    stock.client.hincrby(keys.product(1), "free", 2)
    check = ledger.check()
    assert not check.ok
    assert check.products[1].problems == ["shard 0 lent shard 3 0 units, and that one got 2"]


def test_after_a_rebuild_nothing_is_lent(six):
    outcomes(range(1, 90))
    drained()
    recovery.rebuild(CLI)
    assert not stock.client.keys("sale:*:lent:*")
    assert not stock.client.keys("sale:*:given:*")
    assert outcomes(range(90, 130)) == {"accepted": 11, "sold_out": 29}
    assert proven().free == 0
