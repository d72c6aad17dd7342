"""Dead letters: orders PostgreSQL refuses never block others, and are lost by nobody's decision."""

import re
import threading
from datetime import UTC, datetime, timedelta

import pytest
from occupied import occupy
from sqlalchemy import select, text

from app import cli
from app.audit import CLI
from app.books import ledger, recovery
from app.extensions import db, stock
from app.models import DeadLetter, Order, StockMovement
from app.orders import deadletters, search
from app.orders import drain as drain_module
from app.orders.drain import drain_batch
from app.problems import Unavailable
from app.products import catalogue, movements, terms
from app.stock.keys import KEYS


@pytest.fixture
def letter(app, buy, drain):
    """A dead letter of user 2 with two units, between two orders that were stored."""
    with app.app_context():
        occupy(2)
        assert buy(1).status_code == 200
        assert buy(2, quantity=2, key="mine").status_code == 200
        assert buy(3).status_code == 200
        drain()
        (found,) = deadletters.list_letters()
        yield found


def free() -> int:
    return stock.view([1]).products[1]["free"]


def test_the_rest_of_the_batch_is_stored(letter, client):
    assert letter.error == "order id 2 belongs to another order"
    assert (letter.order_id, letter.user_id, letter.quantity) == (2, 2, 2)
    assert db.session.scalars(select(Order.id).order_by(Order.id)).all() == [1, 2, 3]
    (shown,) = client.get("/purchase/orders/2").json
    assert (shown["id"], shown["status"], shown["quantity"]) == (2, "FAILED", 2)
    assert ledger.check(rows=True).ok
    assert free() == 95


def test_replay_gives_a_new_id_where_the_old_one_is_taken(letter, client, buy):
    (effect,) = deadletters.effect_of([letter.id])
    assert (effect.returned_units, effect.obstacle) == (2, None)
    (done,) = deadletters.replay([letter.id], "the customer called", CLI)
    assert done.done
    assert letter.resolution == "replayed"
    assert letter.replayed_as == 4
    assert free() == 95
    (shown,) = client.get("/purchase/orders/2").json
    assert (shown["id"], shown["status"], shown["quantity"]) == (4, "CONFIRMED", 2)
    # The shopper's own retry is answered with the order that exists.
    assert buy(2, quantity=2, key="mine").json["orderId"] == 4
    result = ledger.check(rows=True)
    assert result.ok
    assert set(result.uncounted) == {(0, 1)}
    ledger.count_persisted(result)
    assert client.get("/purchase/metrics").json["total_processed"] == 4
    entry = db.session.execute(
        text(
            "SELECT after FROM audit_log WHERE action = 'dead-letter.replay'"
            " ORDER BY id DESC LIMIT 1"
        )
    ).scalar()
    assert entry == {"order": 4, "reason": "the customer called"}


def test_a_letter_is_resolved_once(letter):
    assert deadletters.abandon([letter.id], "no answer", CLI)[0].done
    assert free() == 97
    for again in (deadletters.abandon, deadletters.replay):
        (result,) = again([letter.id], "again", CLI)
        assert not result.done
        assert result.message == "It was abandoned already."
    assert free() == 97
    assert ledger.check(rows=True).ok
    assert deadletters.effect_of([letter.id]) == []
    assert not deadletters.abandon([12345], "?", CLI)[0].done


def test_an_order_given_up_stays_listed_as_cancelled(letter, client, admin):
    assert deadletters.abandon([letter.id], "no answer", CLI)[0].done
    (shown,) = client.get("/purchase/orders/2").json
    assert (shown["id"], shown["status"], shown["quantity"]) == (2, "CANCELLED", 2)
    assert client.get("/purchase/orders/2?before=2").json == []
    for query in ("q=2", "q=2&status=CANCELLED", "q=mine"):
        assert "Cancelled</span>" in admin.get(f"/admin/orders/?{query}").text
    for status in ("FAILED", "CONFIRMED", "QUEUED"):
        page = admin.get(f"/admin/orders/?q=2&status={status}").text
        assert "No other order is of a user 2" in page
        assert "within the filters" in page
    (row,) = search.Export(search.Filter(user=2))
    assert (row.status, row.cancelled_by, row.cancel_reason) == (
        "CANCELLED", "command line", "no answer",
    )  # fmt: skip


def test_the_story_of_an_order_given_up(app, buy, drain, admin):
    """One whose key had been forgotten: its id is its own."""
    with app.app_context():
        buy(7, key="mine")
        drain()
        stock.client.hdel(*KEYS.idempotency(7, "mine"))
        buy(7, quantity=2, key="mine")
        drain()
        (letter,) = deadletters.list_letters()
        assert "Decide</a>" in admin.get("/admin/orders/2").text
        deadletters.abandon([letter.id], "no answer", CLI)
    story = admin.get("/admin/orders/2").text
    assert "Decide</a>" not in story
    assert "stays held" not in story
    assert "Abandoned by command line" in story
    assert "2 units back in stock" in story


def test_a_letter_of_an_impossible_time_is_listed(app, letter, client):
    letter.payload = re.sub(r" \d{13} ", " 999999999999999 ", letter.payload)
    db.session.commit()
    (shown,) = client.get("/purchase/orders/2").json
    assert shown["createdAt"].startswith("9999-12-31")


def test_two_at_once_return_the_units_once(app, letter):
    letter_id = letter.id
    db.session.rollback()
    results = []

    def abandon():
        with app.app_context():
            results.extend(deadletters.abandon([letter_id], "both", CLI))

    threads = [threading.Thread(target=abandon) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(result.done for result in results) == [False] * 7 + [True]
    assert free() == 97
    assert ledger.check(rows=True).ok


def test_abandoned_while_redis_is_down_returns_later(letter, monkeypatch):
    def unreachable(*arguments):
        raise Unavailable("test")

    with monkeypatch.context() as patch:
        patch.setattr(stock, "move", unreachable)
        assert deadletters.abandon([letter.id], "gone", CLI)[0].done
    assert free() == 95
    assert ledger.check(rows=True).ok
    movements.finish_pending()
    movements.finish_pending()
    assert free() == 97
    assert ledger.check(rows=True).ok


def test_what_is_no_order_can_only_be_abandoned(app, drain, buy):
    with app.app_context():
        stock.client.xadd(KEYS.outbox, {"order": "nonsense \0 here"}, id="1-0")
        stock.client.set(KEYS.order_ids, 1)
        assert buy(5).status_code == 200
        assert drain() == 1
        (letter,) = deadletters.list_letters()
        assert letter.order_id is None
        (effect,) = deadletters.effect_of([letter.id])
        assert (effect.returned_units, effect.obstacle) == (0, "It is not an order.")
        assert not deadletters.replay([letter.id], "try", CLI)[0].done
        assert deadletters.abandon([letter.id], "nonsense", CLI)[0].done
        assert (
            db.session.scalars(select(StockMovement).where(StockMovement.kind == "return")).all()
            == []
        )
        assert ledger.check(rows=True).ok


def test_a_missing_product_is_waited_for(app, drain, buy):
    """The product's row is gone and comes back: the replay then succeeds."""
    with app.app_context():
        new = {"name": "p", "priceCents": 1, "currency": "USD", "stock": 5}
        product_id = catalogue.create(terms.read_new(new), CLI).product["id"]
        assert buy(1, product_id).status_code == 200
        db.session.execute(text("ALTER TABLE orders DISABLE TRIGGER totals_insert"))
        db.session.commit()
        db.session.execute(text(f"DELETE FROM stock_movements WHERE product_id = {product_id}"))
        db.session.execute(text(f"DELETE FROM products WHERE id = {product_id}"))
        db.session.execute(text("ALTER TABLE orders ENABLE TRIGGER totals_insert"))
        db.session.commit()
        drain()
        (letter,) = deadletters.list_letters()
        assert "fk_orders_product_id" in letter.error
        assert not deadletters.replay([letter.id], "now?", CLI)[0].done
        db.session.execute(
            text(
                "INSERT INTO products (id, name, price_cents, currency)"
                f" VALUES ({product_id}, 'p', 1, 'USD')"
            )
        )
        db.session.commit()
        assert deadletters.replay([letter.id], "now!", CLI)[0].done
        assert db.session.get(Order, letter.order_id).user_id == 1


def test_a_second_order_under_one_key_is_not_replayed(app, buy, drain):
    """Redis forgets a key after 24 hours, PostgreSQL never does: at most one order, ever."""
    with app.app_context():
        occupy(50, key="old", user=7)
        assert buy(7, key="old").status_code == 200
        drain()
        (letter,) = deadletters.list_letters()
        assert letter.error == "the user has another order under this Idempotency-Key"
        (result,) = deadletters.replay([letter.id], "?", CLI)
        assert result.message == "The user has order 50 under the same Idempotency-Key."
        assert deadletters.abandon([letter.id], "duplicate", CLI)[0].done
        assert ledger.check(rows=True).ok


def test_an_abandoned_letter_read_again_stays_abandoned(app, buy, monkeypatch):
    """The trim failed, the letter was given up, the obstacle went away: it must not be stored."""
    with app.app_context():
        occupy(1)
        assert buy(2).status_code == 200
        with monkeypatch.context() as patch:
            patch.setattr(stock.first, "settle", lambda *arguments: False)
            assert drain_batch("test", "test").dead_letters == 1
        (letter,) = deadletters.list_letters()
        deadletters.abandon([letter.id], "given up", CLI)
        db.session.execute(text("DELETE FROM orders WHERE id = 1"))
        db.session.commit()
        drain_batch("test", "test")
        assert stock.waiting() == 0
        assert db.session.scalars(select(Order)).all() == []
        assert free() == 99  # of 100 the one that the deleted order took


def test_an_error_raised_by_a_trigger_is_a_dead_letter_too(app, buy, drain):
    with app.app_context():
        db.session.execute(
            text(
                "CREATE FUNCTION refuse_user_2() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
                " IF new.user_id = 2 THEN RAISE EXCEPTION 'user 2 is refused'; END IF;"
                " RETURN new; END $$;"
                "CREATE TRIGGER refuse_user_2 BEFORE INSERT ON orders"
                " FOR EACH ROW EXECUTE FUNCTION refuse_user_2()"
            )
        )
        db.session.commit()
        try:
            for user in (1, 2, 3):
                assert buy(user).status_code == 200
            assert drain() == 2
            (letter,) = deadletters.list_letters()
            assert letter.error == "user 2 is refused"
            (result,) = deadletters.replay([letter.id], "again", CLI)
            assert result.message == "It was refused again: user 2 is refused"
        finally:
            db.session.rollback()
            db.session.execute(text("DROP TRIGGER refuse_user_2 ON orders"))
            db.session.execute(text("DROP FUNCTION refuse_user_2"))
            db.session.commit()
        assert deadletters.replay([letter.id], "again", CLI)[0].done
        assert ledger.check(rows=True).ok


def test_a_stored_order_read_again_is_no_dead_letter(app, buy, monkeypatch):
    """The trim failed, and PostgreSQL would refuse the order by now: it is stored."""
    with app.app_context():
        assert buy(1).status_code == 200
        with monkeypatch.context() as patch:
            patch.setattr(stock.first, "settle", lambda *arguments: False)
            drain_batch("test", "test")
        db.session.execute(
            text("ALTER TABLE orders ADD CONSTRAINT odd CHECK (user_id > 1) NOT VALID")
        )
        db.session.commit()
        try:
            drained = drain_batch("test", "test")
        finally:
            db.session.execute(text("ALTER TABLE orders DROP CONSTRAINT odd"))
            db.session.commit()
        assert (drained.duplicates, drained.dead_letters) == (1, 0)
        assert ledger.check(rows=True).ok


def test_filters_and_pages(app):
    with app.app_context():
        for number in range(1, 8):
            db.session.add(
                DeadLetter(
                    stream_id=f"{number}-0",
                    payload="x",
                    error="100% wrong" if number % 2 else "other",
                    order_id=number,
                    user_id=number % 3,
                    product_id=1,
                    quantity=1,
                )
            )
        db.session.commit()

        def ids(before=None, limit=50, **filters):
            found = deadletters.list_letters(deadletters.Filters(**filters), before, limit)
            return [letter.order_id for letter in found]

        assert ids() == [7, 6, 5, 4, 3, 2, 1]
        assert ids(limit=2) == [7, 6]
        assert ids(before=6, limit=2) == [5, 4]
        assert ids(user=0) == [6, 3]
        assert ids(product_id=2) == []
        assert ids(error="0% WR") == [7, 5, 3, 1]
        assert ids(error="_") == []
        assert ids(state="abandoned") == []
        assert len(ids(state=None)) == 7


def test_the_commands(letter, runner):
    listed = runner.invoke(args=["dead-letters", "list"])
    assert "order 2  user 2  product 1  quantity 2" in listed.output
    args = ["dead-letters", "abandon", str(letter.id), "--reason", "test"]
    refused = runner.invoke(args=args, input="n\n")
    assert "2 units would return to free stock" in refused.output
    assert free() == 95
    assert runner.invoke(args=[*args, "--yes"]).exit_code == 0
    assert free() == 97
    again = runner.invoke(args=["dead-letters", "replay", str(letter.id), "--reason", "test"])
    assert again.exit_code == 1


def test_the_command_says_what_it_leaves_out(app, runner, monkeypatch):
    monkeypatch.setattr(cli, "LETTERS_AT_ONCE", 2)
    nothing = runner.invoke(args=["dead-letters", "list"])
    assert (nothing.stdout, nothing.stderr) == ("", "There are none.\n")
    with app.app_context():
        db.session.add_all(
            DeadLetter(stream_id=f"{n}-0", payload="x", error="wrong", order_id=n)
            for n in range(1, 8)
        )
        db.session.commit()

    def listed(limit):
        found = runner.invoke(args=["dead-letters", "list", "--limit", str(limit)])
        return [line.split("  ")[2] for line in found.stdout.splitlines()], found.stderr

    newest_first = [f"order {n}" for n in range(7, 0, -1)]
    for limit in (7, 8, 100_000):
        assert listed(limit) == (newest_first, "")
    for limit in (1, 4, 5, 6):
        told = f"There are older ones than these {limit}: see --limit\n"
        assert listed(limit) == (newest_first[:limit], told)


def long_ago() -> datetime:
    return datetime.now(UTC) - timedelta(hours=1)


@pytest.mark.parametrize(
    ("more", "open_one", "given_up"),
    [
        ({}, "FAILED", "CANCELLED"),
        ({"status": "FAILED"}, "FAILED", None),
        ({"status": "CANCELLED"}, None, "CANCELLED"),
        ({"status": "CONFIRMED"}, None, None),
        ({"status": "QUEUED"}, None, None),
        ({"product_id": 1}, "FAILED", "CANCELLED"),
        ({"product_id": 2}, None, None),
        ({"key": "mine"}, "FAILED", "CANCELLED"),
        ({"key": "min"}, None, None),  # a part of it
        ({"reference": "cart-7"}, "FAILED", "CANCELLED"),
        ({"reference": "cart"}, None, None),
        ({"since": True}, "FAILED", "CANCELLED"),
        ({"until": True}, None, None),
    ],
)
def test_the_search_finds_them_as_they_stand(app, buy, drain, more, open_one, given_up):
    for name in ("since", "until"):
        if name in more:
            more = more | {name: long_ago()}
    with app.app_context():
        occupy(1)
        buy(2, key="mine", reference="cart-7")
        drain()
        (letter,) = deadletters.list_letters()
        wanted = search.Filter(user=2, **more)
        for status in (open_one, given_up):
            found = search.search(wanted).orders
            assert [(order.id, order.status) for order in found] == (
                [(1, status)] if status else []
            )
            # The next page begins below it.
            assert search.search(wanted, before=1).orders == []
            deadletters.abandon([letter.id], "r", CLI)
            db.session.expire_all()


@pytest.mark.parametrize("decision", ["replay", "abandon"])
def test_what_an_older_worker_could_not_read_is_read_again(app, buy, drain, decision, monkeypatch):
    """0.1.0 knew no texts for users: their orders became letters without a number or a product."""
    assert buy("auth0|7", quantity=2, key="k", reference="cart-7").status_code == 200
    with app.app_context():
        with monkeypatch.context() as older:
            older.setattr(drain_module, "split", lambda text: None)
            drain_batch("test", "test")
        (letter,) = deadletters.list_letters()
        assert (letter.order_id, letter.product_id, letter.quantity) == (None, None, None)
        (effect,) = deadletters.effect_of([letter.id])
        assert (effect.returned_units, effect.obstacle) == (2, None)
        db.session.rollback()
        decide = {"replay": deadletters.replay, "abandon": deadletters.abandon}[decision]
        (done,) = decide([letter.id], "test", CLI)
        assert done.done
        assert (letter.order_id, letter.user, letter.reference) == (1, "auth0|7", "cart-7")
        assert free() == (98 if decision == "replay" else 100)
        orders = db.session.scalars(select(Order)).all()
        assert [(order.id, order.user) for order in orders] == (
            [(1, "auth0|7")] if decision == "replay" else []
        )
    again = buy("auth0|7", quantity=2, key="k", reference="cart-7")
    assert again.status_code == (200 if decision == "replay" else 409)
    with app.app_context():
        # What that worker took out of the outbox it did not count.
        recovery.rebuild(CLI)
        assert ledger.check(rows=True).ok
        assert free() == (98 if decision == "replay" else 100)
