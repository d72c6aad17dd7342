"""Many orders cancelled at once: exactly those that were counted, once each, whatever is killed."""

import threading

import pytest
from people import send
from sqlalchemy import text

from app.audit import CLI
from app.books import ledger
from app.extensions import db, stock
from app.orders import bulk, cancelling
from app.problems import Unavailable
from app.products.movements import finish_pending

ORDERS = 25


@pytest.fixture
def sold(buy, drain, monkeypatch):
    monkeypatch.setattr(bulk, "BATCH_ORDERS", 10)
    for user in range(1, ORDERS + 1):
        buy(user, quantity=2, reference="even" if user % 2 == 0 else "odd", key=f"key-{user}")
    drain()


@pytest.fixture
def post(client, admin_headers):
    def send(path="", key=None, **body):
        headers = admin_headers | ({"Idempotency-Key": key} if key else {})
        return client.post(f"/orders/bulk-cancels{path}", json=body, headers=headers)

    return send


def work(app):
    with app.app_context():
        while bulk.step():
            pass


def statuses():
    return dict(db.session.execute(text("SELECT status, count(*) FROM orders GROUP BY 1")).all())


def proved(app):
    with app.app_context():
        assert finish_pending() == 0
        assert ledger.check(rows=True).ok
        return stock.view([1]).products[1]["free"]


def begin(app, wanted=None, through=None):
    with app.app_context():
        plan = bulk.plan(wanted or bulk.Wanted(1), through)
        return bulk.start(plan.wanted, plan.orders, "recall", CLI, plan.through_order_id)[0].id


@pytest.mark.usefixtures("sold")
def test_all_orders_of_a_product(app, post, buy, drain, client, admin_headers):
    plan = post(productId=1, dryRun=True)
    assert (plan.status_code, plan.json) == (200, {"orders": 25, "units": 50, "throughOrderId": 25})
    # What is sold since is left alone.
    buy(99)
    drain()
    body = {"productId": 1, "orders": 25, "throughOrderId": 25, "reason": "recall"}
    begun = post(**body, key="k")
    assert (begun.status_code, begun.json["status"]) == (202, "running")
    again = post(**body, key="k")
    assert again.headers["Idempotent-Replayed"] == "true"
    assert again.json["id"] == begun.json["id"]
    assert post(**body | {"orders": 24}, key="k").status_code == 422
    work(app)
    found = client.get(begun.location, headers=admin_headers).json
    assert (found["status"], found["cancelledOrders"], found["cancelledUnits"]) == ("done", 25, 50)
    assert proved(app) == 99
    with app.app_context():
        assert statuses() == {"CANCELLED": 25, "CONFIRMED": 1}
        assert stock.client.keys("*bought*") != []
    assert buy(1, quantity=2, key="key-1", reference="odd").json["code"] == "order_ended"


@pytest.mark.usefixtures("sold")
def test_those_of_a_filter(app, post):
    for wanted in ({"reference": "even"}, {"userId": 3}, {"userId": "3"}):
        plan = post(productId=1, dryRun=True, **wanted).json
        body = {"productId": 1, "orders": plan["orders"], "reason": "x", **wanted}
        assert post(**body).status_code == (202 if plan["orders"] else 400)
        work(app)
    with app.app_context():
        assert statuses() == {"CANCELLED": 13, "CONFIRMED": 12}
    early = post(productId=1, dryRun=True, claimedUntil="2020-01-01T00:00:00Z").json
    late = post(productId=1, dryRun=True, claimedFrom="2020-01-01T00:00:00Z").json
    assert (early["orders"], late["orders"]) == (0, 12)
    assert proved(app) == 100 - 24


@pytest.mark.usefixtures("sold")
@pytest.mark.parametrize("wrong", [1, 24, 26])
def test_another_count_does_nothing(app, post, wrong):
    answer = post(productId=1, orders=wrong, reason="x")
    assert (answer.status_code, answer.json["code"], answer.json["orders"]) == (
        409, "count_changed", 25,
    )  # fmt: skip
    work(app)
    assert proved(app) == 50


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({}, 400), ({"productId": 1}, 400), ({"productId": 1, "orders": 0, "reason": "x"}, 400),
        ({"productId": 1, "orders": 1}, 400), ({"productId": 9, "orders": 1, "reason": "x"}, 404),
        ({"productId": 1, "dryRun": 1}, 400), ({"productId": 1, "user": 1, "dryRun": True}, 400),
        ({"productId": 1, "claimedFrom": "now", "dryRun": True}, 400),
        ({"productId": 1, "userId": "..", "dryRun": True}, 400),
        ({"productId": 1, "throughOrderId": -1, "dryRun": True}, 400),
        ({"productId": 1, "orders": 0, "dryRun": True}, 400),
        ({"productId": 1, "reason": "\u009b", "dryRun": True}, 400),
    ],
)  # fmt: skip
def test_bad_input(post, body, status):
    assert post(**body).status_code == status


@pytest.mark.usefixtures("sold")
def test_a_key_that_is_none_is_refused_in_a_dry_run_too(post):
    answer = post(productId=1, dryRun=True, key="a b")
    assert (answer.status_code, answer.json["field"]) == (400, "Idempotency-Key")


@pytest.mark.usefixtures("sold")
def test_stopped_between_two_batches(app, client, admin_headers):
    bulk_id = begin(app)
    with app.app_context():
        assert bulk.step()
    for _ in range(2):
        stopped = client.delete(f"/orders/bulk-cancels/{bulk_id}", headers=admin_headers)
        assert (stopped.status_code, stopped.json["status"]) == (200, "stopped")
        assert stopped.json["cancelledOrders"] == 10
    work(app)
    assert proved(app) == 50 + 20
    for method in ("GET", "DELETE"):
        path = "/orders/bulk-cancels/999"
        assert client.open(path, method=method, headers=admin_headers).status_code == 404


@pytest.mark.usefixtures("sold")
@pytest.mark.parametrize("place", ["before the commit", "after the commit", "in Redis"])
def test_killed_in_a_batch_another_worker_goes_on(app, monkeypatch, place):
    class Killed(BaseException):
        pass

    def die(*args, **more):
        raise Killed

    bulk_id = begin(app)
    with app.app_context(), monkeypatch.context() as patch:
        if place == "before the commit":
            patch.setattr(db.session, "commit", die)
        elif place == "after the commit":
            patch.setattr(bulk, "apply_together", die)
        else:
            move_all = stock.move_all
            patch.setattr(stock, "move_all", lambda *args: die(move_all(*args)))
        with pytest.raises(Killed):
            bulk.step()
    with app.app_context():
        db.session.rollback()
        finish_pending()
    work(app)
    with app.app_context():
        found = bulk.get(bulk_id)
        assert (found.state, found.cancelled_orders, found.cancelled_units) == ("done", 25, 50)
    assert proved(app) == 100


@pytest.mark.usefixtures("sold")
def test_without_redis_nothing_is_cancelled_until_it_is_back(app, monkeypatch):
    begin(app)

    def away(*args):
        raise Unavailable("gone")

    with app.app_context(), monkeypatch.context() as patch:
        patch.setattr(stock, "generation", away)
        with pytest.raises(Unavailable):
            bulk.step()
        db.session.rollback()
        assert statuses() == {"CONFIRMED": 25}
        patch.undo()
        # It goes in the middle: the units follow.
        patch.setattr(stock, "move_all", away)
        assert bulk.step()
        assert statuses() == {"CONFIRMED": 15, "CANCELLED": 10}
    with app.app_context():
        finish_pending()
    work(app)
    assert proved(app) == 100


@pytest.mark.usefixtures("sold")
def test_two_bulk_cancels_parts_and_single_ones_at_once(app):
    first, second = begin(app), begin(app, bulk.Wanted(1, reference="even"))
    errors = []

    def single():
        with app.app_context():
            for order_id in range(1, ORDERS + 1):
                try:
                    cancelling.cancel(order_id, "x", CLI, units=1)
                except Exception as error:
                    errors.append(getattr(error, "code", repr(error)))

    threads = [threading.Thread(target=work, args=[app]) for _ in range(3)]
    threads.append(threading.Thread(target=single))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    work(app)
    assert set(errors) <= {"already_cancelled"}
    with app.app_context():
        assert statuses() == {"CANCELLED": 25}
        assert [bulk.get(number).state for number in (first, second)] == ["done", "done"]
        done = [bulk.get(number).cancelled_orders for number in (first, second)]
        assert sum(done) == 25
    assert proved(app) == 100


@pytest.mark.usefixtures("sold")
def test_the_command_asks_for_the_count(app, runner):
    command = ["orders", "cancel", "--product", "1", "--reason", "recall"]
    refused = runner.invoke(args=command, input="7\n")
    assert refused.exit_code == 1
    assert "25 orders with 50 units" in refused.output
    done = runner.invoke(args=[*command, "--count", "25"])
    assert done.exit_code == 0, done.output
    assert "Cancelled 25 orders with 50 units." in done.output
    assert (
        runner.invoke(args=["orders", "cancel", "--product", "9", "--reason", "x"]).exit_code == 1
    )
    assert proved(app) == 100


@pytest.mark.usefixtures("sold")
def test_the_pages_count_ask_and_stop(app, admin, support):
    assert support.get("/admin/bulk-cancels/").status_code == 403
    page = admin.get("/admin/bulk-cancels/new?product=1").text
    assert "25 orders of" in page
    assert "50 units go back on sale" in page

    begin = {"product": "1", "through": "25", "reason": "recall"}
    wrong = send(admin, "/admin/bulk-cancels/", count="24", **begin)
    assert wrong.status_code == 422
    assert "There are 25 such orders now, nothing was cancelled" in wrong.text
    for field, value in (("count", ""), ("reason", " "), ("user", ".."), ("product", "")):
        answer = send(admin, "/admin/bulk-cancels/", **{"count": "25", **begin, field: value})
        assert answer.status_code == 422, field
    for _ in range(2):
        begun = send(admin, "/admin/bulk-cancels/", count="25", key="form-1", **begin)
    with app.app_context():
        assert bulk.step()
        assert len(bulk.newest()) == 1
    live = admin.get(f"{begun.location}/live").text
    assert "<html" not in live
    assert "10</span> of 25 orders" in live
    stopped = send(admin, f"{begun.location}/stop")
    assert "stopped by staff" in admin.get(stopped.location).text
    work(app)
    assert proved(app) == 70
    assert send(admin, "/admin/bulk-cancels/999/stop").status_code == 404
    assert "10 of 25" in admin.get("/admin/bulk-cancels/").text
