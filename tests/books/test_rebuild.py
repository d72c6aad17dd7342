"""Redis loses the sale: nothing is sold meanwhile; a rebuild brings back all that was stored."""

import threading
import time
from dataclasses import replace

import pytest
from sqlalchemy import text
from waiting import patience

from app.audit import CLI
from app.books import ledger, recovery
from app.extensions import db, stock
from app.orders import cancelling as orders
from app.orders import deadletters
from app.orders.drain import drain_batch
from app.problems import Conflict, Unavailable, Unprepared
from app.products import catalogue, movements
from app.stock.keys import KEYS
from app.worker import relay


@pytest.fixture
def sold(app, buy, drain):
    """A little of everything: orders, a cancelled one, restocks, a cap, keys, a dead letter."""
    with app.app_context():
        catalogue.change(1, {"per_user_limit": 5}, CLI)
        movements.restock(1, 20, None, CLI)
        for user in range(1, 6):
            assert buy(user, quantity=2, key=f"key-{user}").status_code == 200
        drain()
        orders.cancel(2, "test", CLI)
        yield


def lose_redis() -> None:
    stock.client.flushdb()


def free() -> int:
    return stock.view([1]).products[1]["free"]


def test_a_lost_sale_sells_nothing(sold, client, buy, admin_headers):
    lose_redis()
    answer = buy(9)
    assert answer.status_code == 503
    assert answer.headers["Retry-After"]
    assert client.get("/readyz").json["checks"]["sale"]["ok"] is False
    restock = client.post(
        "/products/restock", json={"productId": 1, "amount": 5}, headers=admin_headers
    )
    assert restock.status_code == 503
    assert client.get("/purchase/metrics").status_code == 503
    with pytest.raises(Unprepared):
        ledger.check()


def test_everything_stored_is_back(sold, client, buy):
    before = stock.view([1]).products[1]
    lose_redis()
    report = recovery.rebuild(CLI)
    assert not report.loss.intact
    assert (report.products, report.free_units, report.orders) == (1, 112, 5)
    assert report.idempotency_keys == 5
    after = stock.view([1]).products[1]
    assert after == before | {"version": after["version"]}
    assert ledger.check(rows=True).ok
    assert not ledger.differences(1)
    assert client.get("/readyz").json["checks"]["sale"]["ok"]
    replay = buy(3, quantity=2, key="key-3")
    assert replay.headers["Idempotent-Replayed"] == "true"
    assert replay.json["orderId"] == 3
    assert buy(3, quantity=1, key="key-3").status_code == 422
    assert stock.client.pttl(KEYS.idempotency(3, "key-3")[0]) == -1
    # The cap counts what was bought before, and what was given back.
    assert buy(1, quantity=4).status_code == 409
    assert buy(1, quantity=3).status_code == 200
    assert buy(2, quantity=5).status_code == 200


def test_ids_go_on_above_everything_issued(sold, buy, drain):
    lose_redis()
    report = recovery.rebuild(CLI)
    assert report.loss.first_order_id == 5 + 1 + recovery.UNKNOWN_IDS
    assert buy(7).json["orderId"] == report.loss.first_order_id
    assert drain() == 1
    assert ledger.check(rows=True).ok
    assert not ledger.differences(1)


def test_keys_are_kept_as_long_as_the_sale(sold, buy):
    db.session.execute(
        text("UPDATE orders SET claimed_at = claimed_at - interval '25 hours' WHERE id = 1")
    )
    db.session.commit()
    kept = {user: stock.client.hgetall(KEYS.idempotency(user, "k")[0]) for user in range(1, 6)}
    lose_redis()
    assert recovery.rebuild(CLI).idempotency_keys == 5
    for user, records in kept.items():
        assert stock.client.hgetall(KEYS.idempotency(user, "k")[0]) == records


def test_what_was_only_in_redis_is_bounded(sold, buy):
    for user in range(20, 27):
        assert buy(user).status_code == 200
    relay.record_issued()
    assert buy(30).status_code == 200  # after the sample: unknowable
    lose_redis()
    report = recovery.rebuild(CLI)
    assert (report.loss.lost_orders_at_most, report.loss.last_known_order_id) == (7, 12)
    assert report.loss.lost_units_at_most == 70
    told = str(report)
    assert "up to number 12 at most 7, with at most 70 units; and besides" in told
    none = replace(report.loss, lost_orders_at_most=0, lost_units_at_most=0)
    assert "up to number 12 none; and besides" in str(none)
    assert f"an unknown number that were claimed after {report.loss.sampled_at}" in told
    assert ledger.differences(1).missing_orders == [(6, 12)]
    again = recovery.rebuild(CLI)
    assert again.loss.intact
    assert again.loss.lost_orders_at_most == 0
    logged = db.session.scalars(
        text("SELECT after FROM audit_log WHERE action = 'sale.rebuild' ORDER BY id")
    ).all()
    assert [entry["lost_orders_at_most"] for entry in logged[-2:]] == [7, 0]


def test_at_the_wrong_time_it_costs_no_order(sold, buy):
    """Redis is fine and orders wait: they are stored first, and ids go on without a gap."""
    for user in range(20, 25):
        assert buy(user, key="waiting").status_code == 200
    report = recovery.rebuild(CLI)
    assert report.loss.intact
    assert report.loss.rescued == 5
    assert report.loss.first_order_id == 11
    assert stock.waiting() == 0
    assert db.session.scalar(text("SELECT count(*) FROM orders")) == 10
    assert ledger.check(rows=True).ok
    assert buy(21, key="waiting").headers["Idempotent-Replayed"] == "true"
    assert buy(40).json["orderId"] == 11


def test_movements_that_hang_between_the_stores(sold, monkeypatch):
    """One recorded only, one carried out in the lost Redis and not marked: each counts once."""
    with monkeypatch.context() as patch:
        patch.setattr(stock, "move", lambda *arguments: (_ for _ in ()).throw(Unavailable("test")))
        for _ in range(2):
            with pytest.raises(Unavailable):
                movements.restock(1, 10, None, CLI)
            db.session.rollback()
    movement_id = db.session.scalar(text("SELECT max(id) FROM stock_movements"))
    db.session.rollback()
    stock.move(stock.generation(), movement_id, 1, 10)
    lose_redis()
    assert recovery.rebuild(CLI).free_units == 132
    assert movements.finish_pending() == 0
    assert ledger.check(rows=True).ok


def test_a_movement_sold_out_before_it_was_marked(app, buy, drain, monkeypatch):
    """Its units are gone with stored orders while it still counts as pending."""
    with app.app_context():
        stock.move(stock.generation(), 999, 1, -99)  # only to leave one unit; undone below
        with monkeypatch.context() as patch:
            real = stock.move

            def move(*arguments):
                real(*arguments)
                raise Unavailable("the answer was lost")

            patch.setattr(stock, "move", move)
            with pytest.raises(Unavailable):
                movements.restock(1, 5, None, CLI)
            db.session.rollback()
        assert buy(1, quantity=6).status_code == 200
        drain()
        lose_redis()
        recovery.rebuild(CLI)
        assert free() == 99
        assert ledger.check(rows=True).ok


def test_dead_letters_keep_their_stock(app, buy, drain):
    with app.app_context():
        stock.client.set(KEYS.order_ids, 10)
        db.session.execute(
            text(
                "INSERT INTO orders (id, user_id, product_id, quantity, unit_price_cents, currency,"
                " claimed_at) VALUES (11, 99, 1, 1, 1, 'USD', now())"
            )
        )
        db.session.commit()
        assert buy(1, quantity=3, key="dead").status_code == 200
        drain()
        (letter,) = deadletters.list_letters()
        lose_redis()
        report = recovery.rebuild(CLI)
        assert (report.free_units, report.dead_letters) == (96, 1)
        assert buy(1, quantity=3, key="dead").json["orderId"] == 11
        deadletters.abandon([letter.id], "test", CLI)
        assert free() == 99
        lose_redis()
        assert recovery.rebuild(CLI).free_units == 99
        assert ledger.check(rows=True).ok


def test_two_at_once_and_shoppers_meanwhile(app, sold, buy):
    """One rebuild at a time; each purchase around it is either refused or kept."""
    db.session.rollback()
    results: list = []
    promised: list[int] = []
    stopped = threading.Event()

    def rebuild():
        with app.app_context():
            try:
                results.append(recovery.rebuild(CLI))
            except Conflict as error:
                results.append(error.code)

    def shop(number):
        user = number * 1000
        while not stopped.is_set():
            user += 1
            claim = stock.claim(user, 1, 1, None, "a")
            if claim.outcome == b"accepted":
                promised.append(claim.detail)
            time.sleep(0.001)

    def drain_all():
        while not stopped.is_set():
            with app.app_context():
                drain_batch("test", "test", most=5)
            time.sleep(0.002)

    movements.restock(1, 100_000, None, CLI)
    threads = [threading.Thread(target=shop, args=(number,)) for number in (1, 2)]
    threads.append(threading.Thread(target=drain_all))
    for thread in threads:
        thread.start()
    for _ in range(5):
        rebuilds = [threading.Thread(target=rebuild) for _ in range(3)]
        for thread in rebuilds:
            thread.start()
        for thread in rebuilds:
            thread.join()
        time.sleep(0.05)
    stopped.set()
    for thread in threads:
        thread.join()
    done = [result for result in results if not isinstance(result, str)]
    assert len(done) >= 5
    assert {result for result in results if isinstance(result, str)} <= {"rebuild_running"}
    assert all(report.loss.intact for report in done)
    while stock.waiting():
        drain_batch("test", "test")
    stored = set(db.session.scalars(text("SELECT id FROM orders")))
    assert len(promised) > 20
    assert set(promised) <= stored
    assert len(promised) == len(set(promised)) == len(stored) - 5
    assert ledger.check(rows=True).ok
    assert not ledger.differences(1)


def test_interrupted_anywhere_it_stays_closed_and_can_be_repeated(sold, buy, monkeypatch):
    for user in range(20, 23):
        assert buy(user).status_code == 200
    steps = ("clear_sale", "put_accounts", "put_movements", "put_bought", "put_keys", "open")
    for step in steps:

        def fail(*arguments, **options):
            raise Unavailable("test")

        with monkeypatch.context() as patch:
            patch.setattr(stock.first, step, fail)
            with pytest.raises(Unavailable):
                recovery.rebuild(CLI)
        assert buy(50).status_code == 503, step
        assert drain_batch("test", "test").persisted == 0
    report = recovery.rebuild(CLI)
    assert report.loss.lost_orders_at_most == 0
    assert report.free_units == 109
    assert db.session.scalar(text("SELECT count(*) FROM orders")) == 8
    assert ledger.check(rows=True).ok
    assert not ledger.differences(1)


def test_what_is_sold_the_moment_it_opens_is_sold_by_its_terms(sold, buy, monkeypatch):
    """The terms are in force before the first claim is let in: no valid purchase is a final 400."""
    opened = []
    original = stock.first.open

    def open_and_sell(*arguments, **options):
        original(*arguments, **options)
        opened.append(buy(40, quantity=2))
        opened.append(buy(41, quantity=11))

    monkeypatch.setattr(stock.first, "open", open_and_sell)
    recovery.rebuild(CLI)
    assert [answer.status_code for answer in opened] == [200, 400]
    assert opened[1].json["error"] == "quantity must be from 1 to 10"
    entry = stock.newest_waiting(1)[0][1]
    assert (entry.unit_price_cents, entry.currency) == (99_999, "USD")


def test_another_sale_in_redis_is_not_replaced_by_accident(sold, buy, runner):
    stock.client.set(KEYS.generation, "somebody-else")
    assert buy(20, key="k").status_code == 200  # a connection from before: see the next test
    with pytest.raises(recovery.ForeignSale):
        recovery.rebuild(CLI)
    assert stock.generation() == "somebody-else"
    assert stock.waiting() == 1
    assert drain_batch("test", "test").persisted == 0
    with pytest.raises(Unprepared):
        movements.restock(1, 5, None, CLI)
    refused = runner.invoke(args=["rebuild", "--yes"])
    assert refused.exit_code == 1
    assert "--replace" in refused.output
    assert runner.invoke(args=["rebuild", "--yes", "--replace"]).exit_code == 0
    assert ledger.check(rows=True).ok


def test_a_new_connection_refuses_another_sale(make_app):
    """Whoever exchanges the Redis behind a URL cuts the connections to the old one."""
    app = make_app()
    client = app.test_client()
    body = {"userId": 1, "productId": 1}
    stock.client.set(KEYS.generation, "somebody-else")
    on_record = lambda: recovery.sale_on_record(app)  # noqa: E731
    stock.init_app(app.config["SETTINGS"], on_record)
    assert client.post("/purchase", json=body).status_code == 503
    with app.app_context():
        recovery.rebuild(CLI, replace=True)
    time.sleep(0.3)  # the breaker's time
    assert client.post("/purchase", json=body).status_code == 200


def test_a_redis_that_went_back_in_time_is_closed(app, sold, buy):
    """An old copy was restored: it would issue ids twice and sell units that are sold."""
    stock.client.set(KEYS.order_ids, 3)
    assert recovery.close_when_stale()
    assert buy(20).status_code == 503
    assert not recovery.close_when_stale()
    report = recovery.rebuild(CLI)
    assert report.loss.first_order_id > 5
    assert ledger.check(rows=True).ok


def test_the_sweeper_touches_no_other_sale(sold):
    stock.client.set(KEYS.generation, "somebody-else")
    before = stock.client.hgetall(KEYS.product(1))
    db.session.execute(
        text(
            "INSERT INTO stock_movements (product_id, kind, units, actor)"
            " VALUES (1, 'restock', 50, 'test')"
        )
    )
    db.session.commit()
    stopped = threading.Event()
    stopped.set()
    relay.Sweeper().run_once(stopped)
    assert stock.client.hgetall(KEYS.product(1)) == before


def test_the_command(sold, runner):
    lose_redis()
    result = runner.invoke(args=["rebuild"], input="y\n")
    assert result.exit_code == 0
    assert "5 stored orders" in result.output


@pytest.mark.drill
def test_two_hundred_thousand_orders_take_seconds(app):
    with app.app_context():
        movements.restock(1, 1_000_000, None, CLI)
        db.session.execute(
            text(
                "INSERT INTO orders (id, user_id, product_id, quantity, unit_price_cents, currency,"
                " claimed_at, idempotency_key) SELECT n, n * 7919 % 1000000 + 1, 1, 1, 1, 'USD',"
                " now(), CASE WHEN n % 2 = 0 THEN 'key-' || n END FROM generate_series(1, 200000) n"
            )
        )
        db.session.commit()
        lose_redis()
        started = time.monotonic()
        report = recovery.rebuild(CLI)
        assert report.idempotency_keys == 100_000
        assert report.free_units == 100 + 1_000_000 - 200_000
        assert time.monotonic() - started < patience(20)
        assert ledger.check(rows=True).ok
