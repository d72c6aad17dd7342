"""The ledger: no false alarm under load, a drift of one unit found, repairs that can't oversell."""

import json
import threading

import pytest
from drills import drill
from sqlalchemy import text
from waiting import wait_until

from app.audit import CLI
from app.books import ledger
from app.extensions import db, stock
from app.orders import cancelling as orders
from app.orders.drain import drain_batch
from app.problems import Unprepared
from app.products import movements
from app.stock.keys import KEYS


@pytest.fixture
def sold(app, buy, drain):
    """Five orders stored, one of them cancelled, and three that wait."""
    for user in range(1, 6):
        assert buy(user, quantity=2, key=f"key-{user}").status_code == 200
    drain()
    with app.app_context():
        orders.cancel(1, "test", CLI)
    for user in range(6, 9):
        assert buy(user).status_code == 200
    with app.app_context():
        yield


def check_one() -> ledger.ProductCheck:
    result = ledger.check(rows=True)
    return result.products[1]


def test_tells_every_figure(sold):
    result = ledger.check(rows=True)
    assert result.ok
    found = result.products[1]
    assert (found.moved, found.stored, found.queued, found.free) == (102, 10, 3, 89)
    assert found.difference == 0
    assert not ledger.differences(1)


@pytest.mark.parametrize("count_up_to", [0, 1000])
@pytest.mark.parametrize(
    ("field", "amount", "difference"),
    [("free", 1, 1), ("free", -1, -1), ("moved", 1, 0), ("claimed", -1, 0), ("settled_units", 1, 0),
     ("accepted", 1, 0), ("settled", 1, 0)],
)  # fmt: skip
def test_finds_a_drift_of_one_in_each_counter(sold, field, amount, difference, count_up_to):
    stock.client.hincrby(KEYS.product(1), field, amount)
    result = ledger.check(count_up_to)
    assert not result.ok
    if count_up_to:
        assert result.products[1].difference == difference


def test_finds_a_unit_taken_without_an_order(sold):
    """Free and claimed agree with each other, and the outbox alone tells."""
    stock.client.hincrby(KEYS.product(1), "free", -1)
    stock.client.hincrby(KEYS.product(1), "claimed", 1)
    found = check_one()
    assert not found.ok
    assert found.difference == -1


def test_finds_a_lost_order_and_its_id(sold):
    db.session.execute(text("DELETE FROM orders WHERE id = 3"))
    db.session.commit()
    found = check_one()
    assert found.difference == -2
    assert ledger.differences(1).missing_orders == [(3, 3)]


def test_finds_an_order_lost_from_the_outbox(sold):
    stock.client.xdel(KEYS.outbox, "7-0")
    result = ledger.check()
    assert not result.ok
    assert result.products[1].difference == -1
    found = ledger.differences(1)
    assert found.missing_orders == [(7, 7)]
    assert found.not_waiting == [7]


def test_finds_an_order_that_was_never_claimed(sold):
    db.session.execute(
        text(
            "INSERT INTO orders (id, user_id, product_id, quantity, unit_price_cents, currency,"
            " claimed_at) VALUES (1000, 1, 1, 4, 1, 'USD', now())"
        )
    )
    db.session.commit()
    assert check_one().difference == 4
    assert ledger.differences(1).unknown_orders == [1000]


def test_finds_a_movement_that_redis_forgot(sold):
    movement_id = db.session.scalar(text("SELECT id FROM stock_movements WHERE kind = 'return'"))
    stock.client.setbit(KEYS.movements, movement_id, 0)
    assert ledger.check().ok  # the units are there: the bit only guards against a repetition
    assert ledger.differences(1).unapplied_movements == [movement_id]


def test_finds_a_redis_that_went_back_in_time(sold):
    """It would give orders that are stored their numbers again."""
    assert stock.client.decrby(KEYS.order_ids, 4) == 4
    result = ledger.check()
    assert not result.ok
    assert result.problems == [
        "Redis counts orders up to 4, but order 5 is stored: it has gone back in time"
    ]


def test_a_movement_that_waits_is_its_products_alone(app, sold, client, admin_headers, monkeypatch):
    lamp = {"name": "Lamp", "priceCents": 1, "currency": "EUR", "stock": 7}
    assert client.post("/products", json=lamp, headers=admin_headers).status_code == 201
    with monkeypatch.context() as patch:
        patch.setattr(stock, "move", lambda *arguments: (_ for _ in ()).throw(Unprepared("test")))
        for product_id, units in ((1, 10), (2, 20)):
            with pytest.raises(Unprepared):
                movements.restock(product_id, units, None, CLI)
    db.session.rollback()
    result = ledger.check()
    assert result.ok
    assert {n: of.pending for n, of in result.products.items()} == {1: 10, 2: 20}


def test_a_movement_between_the_two_stores_is_no_drift(app, sold, monkeypatch):
    """Recorded and not applied; applied and not marked: neither is an alarm."""
    with monkeypatch.context() as patch:
        patch.setattr(stock, "move", lambda *arguments: (_ for _ in ()).throw(Unprepared("test")))
        with pytest.raises(Unprepared):
            movements.restock(1, 10, None, CLI)
    db.session.rollback()
    found = check_one()
    assert found.ok
    assert found.pending == 10
    movement_id = db.session.scalar(text("SELECT max(id) FROM stock_movements"))
    db.session.rollback()
    stock.move(stock.generation(), movement_id, 1, 10)
    found = check_one()
    assert found.ok
    assert (found.pending, found.free) == (0, 99)
    movements.finish_pending()
    assert check_one().free == 99


def test_a_batch_stored_and_not_trimmed_is_no_drift(sold, monkeypatch):
    monkeypatch.setattr(stock.first, "settle", lambda *arguments: False)
    drain_batch("test", "test")
    found = check_one()
    assert found.ok
    assert (found.stored, found.queued) == (13, 0)


def test_a_batch_read_again_in_part_is_no_drift(sold, monkeypatch):
    monkeypatch.setattr(stock.first, "settle", lambda *arguments: False)
    drain_batch("test", "test", most=3)
    drain_batch("test", "test", most=1)
    assert check_one().ok


def test_totals_that_differ_from_their_rows_are_found(sold):
    db.session.execute(text("UPDATE product_totals SET confirmed_units = confirmed_units + 1"))
    db.session.commit()
    assert any("confirmed" in problem for problem in check_one().problems)


@pytest.mark.parametrize("checks", [15, drill(60)])
def test_no_false_alarm_under_load(app, checks):
    """Purchases, drains, restocks and cancels at full speed while the ledger is checked."""
    stopped = threading.Event()
    failures: list[BaseException] = []

    def keep(step):
        def run():
            number = 0
            try:
                while not stopped.is_set():
                    number += 1
                    with app.app_context():
                        step(number)
            except BaseException as error:
                failures.append(error)

        return threading.Thread(target=run)

    def cancel(number):
        if found := db.session.scalar(text("SELECT max(id) FROM orders WHERE status='CONFIRMED'")):
            orders.cancel(found, "test", CLI)

    def claim(number):
        stock.claim(number, 1, 1, None, "a")

    threads = [
        keep(claim),
        keep(claim),
        keep(lambda number: drain_batch("test", "test", most=20)),
        keep(lambda number: movements.restock(1, 50, None, CLI)),
        keep(cancel),
    ]
    for thread in threads:
        thread.start()
    done = 0
    try:
        with app.app_context():
            wait_until(lambda: stock.view([1]).last_order_id > 50)
            for number in range(checks):
                result = ledger.check(count_up_to=1000 if number % 2 else 0)
                assert result.ok, [product.problems for product in result.products.values()]
                done += 1
            stock.client.hincrby(KEYS.product(1), "free", 1)
            result = ledger.check()
            assert result.products[1].difference == 1
    finally:
        stopped.set()
        for thread in threads:
            thread.join()
    assert not failures
    assert done == checks


def test_repair_takes_what_could_oversell(sold, runner):
    stock.client.hincrby(KEYS.product(1), "free", 5)
    shown = runner.invoke(args=["ledger", "repair"], input="n\n")
    assert "5 free units to take" in shown.output
    assert check_one().difference == 5
    done = runner.invoke(args=["ledger", "repair", "--yes"])
    assert "5 free units taken" in done.output
    assert check_one().ok
    entry = db.session.execute(
        text("SELECT before, after FROM audit_log WHERE action = 'ledger.repair'")
    ).one()
    assert entry.before["free"] == 94
    assert entry.after["take"] == 5
    assert runner.invoke(args=["ledger", "repair"]).output == "There is nothing to repair.\n"


def test_repair_never_makes_stock(sold):
    """A lost order looks like missing stock; to sell it again could be to sell it twice."""
    db.session.execute(text("DELETE FROM orders WHERE id = 3"))
    db.session.commit()
    (step,) = ledger.repair(CLI)
    assert (step.take, step.held_back) == (0, 2)
    assert stock.view([1]).products[1]["free"] == 89
    assert check_one().difference == -2


def test_repair_of_a_sold_out_product_stops_at_zero(sold):
    stock.client.hset(KEYS.product(1), "free", 0)
    stock.client.hincrby(KEYS.product(1), "moved", 200)
    stock.client.hincrby(KEYS.product(1), "free", 3)
    db.session.execute(
        text(
            "INSERT INTO orders (id, user_id, product_id, quantity, unit_price_cents, currency,"
            " claimed_at) VALUES (1000, 1, 1, 100, 1, 'USD', now())"
        )
    )
    db.session.commit()
    (step,) = ledger.repair(CLI)
    assert step.take == 3
    assert stock.view([1]).products[1]["free"] == 0


def test_the_command_exits_with_1_and_names_the_ids(sold, runner):
    assert runner.invoke(args=["ledger", "check"]).exit_code == 0
    stock.client.xdel(KEYS.outbox, "8-0")
    result = runner.invoke(args=["ledger", "check"])
    assert result.exit_code == 1
    assert "issued and nowhere: order 8" in result.output
    figures = json.loads(runner.invoke(args=["ledger", "check", "--json"]).output)
    assert figures["ok"] is False
    assert figures["products"]["1"]["difference"] == -1


def test_the_sweeper_leaves_a_check_for_the_dashboard(sold):
    ledger.check_in_turn()
    first = json.loads(stock.client.get(KEYS.ledger))
    assert first["ok"] is True
    assert first["products"]["1"]["free"] == 89
    ledger.check_in_turn()
    assert json.loads(stock.client.get(KEYS.ledger)) == first  # not its turn yet
    stock.client.delete(KEYS.ledger_turn, KEYS.generation)
    ledger.check_in_turn()
    assert json.loads(stock.client.get(KEYS.ledger))["ok"] is False


def test_correct_changes_stock_by_a_movement(sold, runner):
    assert runner.invoke(args=["stock", "correct", "1", "-9", "--reason", "broken"]).exit_code == 0
    found = check_one()
    assert found.ok
    assert found.free == 80
    refused = runner.invoke(args=["stock", "correct", "1", "-81", "--reason", "broken"])
    assert refused.exit_code == 1
    assert "Only 80 units are free" in refused.output
    assert check_one().ok


def test_no_quiet_moment_is_told_and_harms_nothing(sold, connect, monkeypatch, runner):
    """Somebody who writes for longer than the ledger waits for a standstill."""
    monkeypatch.setattr(ledger, "READINGS", 1)
    writer = connect()
    writer.execute("UPDATE orders SET cancel_reason = NULL WHERE id = 2")
    with pytest.raises(ledger.Unquiet):
        ledger.check()
    answer = runner.invoke(args=["ledger", "check"])
    assert answer.exit_code == 1
    assert answer.output == "Error: the ledger found no quiet moment; try again\n"
    writer.connection.rollback()
    assert ledger.check().ok
