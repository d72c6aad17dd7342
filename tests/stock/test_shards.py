"""A sale of several shards: the same promises as one of one."""

import threading
from collections import Counter
from dataclasses import replace

import pytest
import redis
from people import API_TOKEN
from redis.connection import AbstractConnection
from redis.crc import key_slot
from sqlalchemy import text
from waiting import wait_until

from app import create_app
from app.audit import CLI
from app.books import ledger, recovery
from app.config import NO_LIMIT, SHARD_COUNTS
from app.extensions import db, stock
from app.orders import cancelling
from app.orders.drain import drain_batch
from app.problems import Unavailable
from app.products import movements
from app.stock.plan import Placed, warnings
from app.stock.shards import Part, first_above, tag_of
from app.worker import relay

# What each prime number of equal nodes gets of a sale's shards, by which the table was searched.
NODES = (2, 3, 4, 6, 8, 12)


@pytest.mark.parametrize("shards", SHARD_COUNTS)
def test_tags_are_spread_evenly_over_equal_nodes(shards):
    tags = [tag_of(shard, shards) for shard in range(shards)]
    assert len(set(tags)) == shards
    assert tags[0] == "0"
    for nodes in NODES:
        if shards % nodes == 0:
            on = Counter(key_slot(f"{{{tag}}}".encode()) * nodes // 16_384 for tag in tags)
            assert set(on.values()) == {shards // nodes}, (shards, nodes)


def test_the_first_tags_of_the_table_would_not_do():
    on = Counter(key_slot(f"{{{tag_of(n, 24)}}}".encode()) * 3 // 16_384 for n in range(6))
    assert sorted(on.values()) != [2, 2, 2]


@pytest.mark.parametrize("units", [0, 1, 5, 6, 7, 100, -3])
def test_dealt_units_add_up_and_differ_by_one_at_most(units):
    parts = [Part(shard, 6).deals(units, 4) for shard in range(6)]
    assert sum(parts) == units
    assert max(parts) - min(parts) <= 1


def test_the_rest_goes_from_the_movement_s_own_shard_on():
    assert [Part(shard, 6).deals(2, 11) for shard in range(6)] == [1, 0, 0, 0, 0, 1]


def test_names():
    assert Part().generation("abc") == "abc"
    assert Part(2, 6).generation("abc") == "abc/6/2"
    assert Part(2, 6).sale_of("abc/6/2") == "abc"
    for foreign in ("abc", "abc/6/3", "abc/3/2"):
        assert Part(2, 6).sale_of(foreign) != "abc"
    assert Part().sale_of("abc/6/0") != "abc"
    assert Part(2, 6).sale_of("") == Part().sale_of("") == ""
    assert (first_above(0, 1), first_above(7, 1)) == (1, 8)
    assert (first_above(0, 6), first_above(6, 6), first_above(7, 6)) == (6, 12, 12)


@pytest.fixture(params=[1, 6])
def shop(request, make_app):
    """An app whose sale has so many shards, all in one Redis."""
    app = make_app(shards=request.param, purchase_user_limit=NO_LIMIT)
    with app.app_context():
        yield app


@pytest.fixture
def six(make_app):
    app = make_app(shards=6, purchase_user_limit=NO_LIMIT)
    with app.app_context():
        yield app


@pytest.fixture
def round_trips(monkeypatch):
    """Return a function that counts what is sent to Redis while another one runs."""
    send = AbstractConnection.send_packed_command

    def counted(do) -> int:
        sent = []

        def note(connection, *arguments, **options):
            sent.append(connection)
            return send(connection, *arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(AbstractConnection, "send_packed_command", note)
            do()
        return len(sent)

    return counted


def test_all_shards_of_a_node_are_asked_at_once(make_app, round_trips):
    """Also one that was promoted a moment ago, and knows no script; what it can't answer, alone."""
    with make_app(shards=24, purchase_user_limit=NO_LIMIT).app_context():
        buy_all(range(50))
        for do in (
            lambda: stock.view([1]), stock.product_ids, stock.generation, stock.waiting,
            stock.first_waiting, stock.braked, stock.clock, stock.brakes.agree, stock.try_write,
        ):  # fmt: skip
            do()
            assert round_trips(do) == 1
        sampler, stopped = relay.Sampler("test"), threading.Event()
        stopped.set()
        sampler.run_once(stopped)
        assert round_trips(lambda: sampler.run_once(stopped)) <= 8
        ledger.check()
        # Its products, its accounts, what was lent at two moments, and the time.
        assert round_trips(ledger.check) == 5
        stock.client.script_flush()
        assert stock.view([1]).waiting == 50
        assert round_trips(lambda: stock.view([1])) == 1
        stock.client.set(stock.shards[7].keys.outbox, "of another type")
        view = stock.view([1])
        assert view.missing == (7,)
        assert "WRONGTYPE" in str(view.parts[7])
        assert stock.first_waiting().keys() == {
            number for number in range(24) if number != 7 and view.parts[number].waiting
        }
        with pytest.raises(Unavailable):
            stock.waiting()


def buy_all(users, quantity=1, key=None):
    """Return the outcomes of the users' purchases."""
    return Counter(
        stock.claim(user, 1, quantity, key and f"{key}{user}", "a").outcome.decode()
        for user in users
    )


def answers():
    """Tell whether claims are sent again."""
    try:
        return stock.claim(1000, 99, 1, None, "a")
    except Unavailable:
        return None


def drained():
    while stock.waiting():
        drain_batch("test", "test")


def is_even():
    check = ledger.check(rows=True)
    assert check.ok, (check.problems, [of.problems for of in check.products.values()])
    return check.products[1]


def test_a_purchase_its_order_and_the_ledger(shop):
    users = [*range(1, 41), *(f"user-{n}" for n in range(40))]
    outcomes = buy_all(users, key="k")
    sold = outcomes["accepted"]
    assert set(outcomes) <= {"accepted", "sold_out", "dry"}
    assert sold > 60
    for user in users:
        claim = stock.claim(user, 1, 1, f"k{user}", "a")
        assert claim.outcome in (b"replayed", b"sold_out", b"dry")
        if claim.outcome == b"replayed":
            # A shard is read from the id.
            assert claim.detail % len(stock.shards) == stock.shard_of(user).part.shard % len(
                stock.shards
            )
            ((found, _),) = stock.queued_orders(user, 9)
            assert found == claim.detail
            assert stock.waiting_order(found).user == user
    assert is_even().queued == sold
    drained()
    product = is_even()
    assert (product.stored, product.free) == (sold, 100 - sold)
    ids = db.session.scalars(text("SELECT id FROM orders ORDER BY id")).all()
    assert len(ids) == sold
    assert stock.view([1]).products[1]["free"] == 100 - sold
    assert not ledger.differences(1)
    relay.record_issued()
    recovery.close_when_stale()
    assert not stock.view([1]).missing
    assert buy_all(users, key="k")["accepted"] == 0


def test_restocks_returns_and_corrections(shop):
    assert movements.restock(1, 7, None, CLI).free == 107
    buy_all(range(1, 21), quantity=2)
    drained()
    is_even()
    for order_id in db.session.scalars(text("SELECT id FROM orders ORDER BY id LIMIT 5")).all():
        cancelling.cancel(order_id, "changed their mind", CLI)
    product = is_even()
    assert product.free == 107 - 40 + 10
    assert movements.correct(1, -3, "miscounted", CLI) == 74
    assert movements.correct(1, 3, "miscounted", CLI) == 77
    is_even()
    # What a shopper gave back the same one may buy again.
    assert sum(db.session.scalars(text("SELECT moved_units FROM product_sums")).all()) == 117


def test_units_that_were_sold_before_they_are_on_record_are_owed_by_their_shards(six):
    """Redis had a restock; who was to say so in PostgreSQL was killed."""
    movements.correct(1, -90, "few", CLI)
    movements.restock(1, 2, None, CLI)
    assert buy_all(range(1, 14)) == {"accepted": 12, "sold_out": 1}
    drained()
    forget = "UPDATE stock_movements SET applied_at = NULL, parts = NULL WHERE kind = 'restock'"
    db.session.execute(text(forget))
    db.session.commit()
    recovery.rebuild(CLI)
    assert [shard.view([1]).products[1]["free"] for shard in stock.shards] == [0] * 6
    assert buy_all(range(14, 40)) == {"sold_out": 26}
    assert ledger.check(rows=True).ok


@pytest.mark.parametrize("act", ["confirm", "release"])
def test_an_order_that_changes_beside_a_rebuild_counts_once(make_app, monkeypatch, act):
    app = make_app(shards=6, purchase_user_limit=NO_LIMIT)
    client, headers = app.test_client(), {"Authorization": f"Bearer {API_TOKEN}"}
    client.patch("/products/1", json={"holdSeconds": 300}, headers=headers)
    deal_anew, answers = recovery.deal_anew, []

    def change() -> None:
        body = {"reason": "test"} if act == "release" else {}
        answers.append(client.post(f"/orders/{order}/{act}", json=body, headers=headers))

    def while_it_is_dealt(*args) -> None:
        deal_anew(*args)
        changing.start()
        waits = text("SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted)")
        wait_until(lambda: db.session.scalar(waits), what=f"the {act} to wait")

    with app.app_context():
        order = stock.claim(1, 1, 1, None, "192.0.2.1").detail
        drain_batch("test", "test")
        monkeypatch.setattr(recovery, "deal_anew", while_it_is_dealt)
        changing = threading.Thread(target=change)
        recovery.rebuild(CLI)
        changing.join()
        # Where it waited for too long it changed nothing, and can be asked again.
        if answers[0].status_code == 503:
            change()
        assert answers[-1].status_code == 200
        movements.finish_pending()
        found = ledger.check(rows=True)
        assert found.ok, str(found)


@pytest.mark.parametrize(("before", "after"), [(1, 6), (6, 1), (6, 6), (6, 12)])
def test_a_rebuild_deals_the_sale_anew(make_app, before, after):
    app = make_app(shards=before, purchase_user_limit=NO_LIMIT)
    with app.app_context():
        sold = buy_all(range(1, 31), key="k")["accepted"]
        drained()
        sold += buy_all(range(31, 41), key="k")["accepted"]
        settings = app.config["SETTINGS"]
    app = create_app(replace(settings, shards=after))
    with app.app_context():
        if before != after:
            with pytest.raises(Unavailable):
                stock.claim(1000, 1, 1, None, "a")
        report = recovery.rebuild(CLI)
        assert report.loss.intact
        assert report.free_units == 100 - sold
        wait_until(answers, what="the pause after the refused claim")
        product = is_even()
        assert (product.free, product.stored) == (100 - sold, sold)
        assert set(buy_all(range(1, 41), key="k")) <= {"replayed", "sold_out", "accepted", "dry"}
        assert buy_all(range(1, 41), key="k")["replayed"] >= sold
        buy_all(range(100, 130))
        drained()
        is_even()
        assert not ledger.differences(1)
        keys = redis.Redis.from_url(settings.redis_url).keys("sale:*:outbox")
        assert len(keys) <= after


def test_what_went_out_before_the_dealing_must_have_been_put_on_sale(six):
    assert ledger.check().ok
    older = "UPDATE product_totals SET confirmed_units = confirmed_units + 2 WHERE shard = -1"
    db.session.execute(text(older))
    db.session.commit()
    assert ledger.check().products[1].problems == [
        "before this dealing 0 units were put on sale, 2 went out"
    ]


def test_a_shard_that_came_back_empty_is_made_anew_and_its_loss_told(six):
    """Another node has its slots and none of its data."""
    recovery.reset(CLI)
    buy_all(range(1, 31), key="k")
    drained()
    buy_all(range(31, 61), key="k")
    relay.record_issued()
    lost = stock.shards[2]
    gone = lost.client.xlen(lost.keys.outbox)
    assert gone
    for name in lost.client.keys(f"*{{{lost.part.tag}}}*"):
        lost.client.delete(name)
    others = [user for user in range(61, 91) if stock.shard_of(user) is not lost]
    assert buy_all(others)["accepted"]
    report = recovery.rebuild(CLI)
    assert (report.loss.intact, report.loss.lost_orders_at_most) == (False, gone)
    product = is_even()
    assert product.free == 100 - product.stored


def test_the_plan_warns_of_what_is_unwise():
    a, b = ("a", 1), ("b", 1)
    even = [Placed(0, 1, a, [b]), Placed(1, 9, b, [a])]
    assert warnings(even, 1) == []
    assert "different numbers" in warnings([*even, Placed(2, 5, a, [b])], 1)[0]
    assert "asks for 2" in warnings(even, 2)[0]
    assert "loses answered orders" in warnings([even[0], Placed(1, 9, b, [a, ("c", 1)])], 1)[0]
    assert "no replica" in warnings([even[0], Placed(1, 9, b, [])], 0)[0]
    assert "one node" in warnings([even[0], Placed(1, 9, a, [b])], 1)[0]
