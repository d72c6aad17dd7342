"""Orders for the shop's programs: one, many, given back whole and in part, stored or not yet."""

import threading

import pytest
from crowd import at_once
from sqlalchemy import select, text

from app.audit import CLI
from app.books import ledger, recovery
from app.extensions import db, stock
from app.models import AuditEntry, DeadLetter, Order, OrderIntent
from app.orders import cancelling, deadletters, intents
from app.problems import Conflict, Unavailable
from app.products.movements import finish_pending
from app.staff import tokens


def free():
    return stock.view([1]).products[1]["free"]


@pytest.fixture
def cancel(client, admin_headers):
    def post(order_id, key=None, **body):
        headers = admin_headers | ({"Idempotency-Key": key} if key else {})
        body = {"reason": "returned"} | body
        return client.post(f"/orders/{order_id}/cancel", json=body, headers=headers)

    return post


@pytest.fixture
def show(client, admin_headers):
    return lambda order_id: client.get(f"/orders/{order_id}", headers=admin_headers)


def proved(app):
    with app.app_context():
        assert finish_pending() == 0
        assert ledger.check(rows=True).ok
        return free()


def test_the_audit_has_the_units_that_were_and_that_are_left(buy, drain, cancel, app):
    buy(1, quantity=3)
    drain()
    cancel(1, quantity=1)
    cancel(1)
    with app.app_context():
        of = AuditEntry.action == "order.cancel"
        entries = db.session.scalars(select(AuditEntry).where(of).order_by(AuditEntry.id)).all()
    told = [
        (entry.before["units"], entry.after["units"], entry.after["returned"]) for entry in entries
    ]
    assert told == [(3, 2, 1), (2, 0, 2)]


def test_one_order_from_the_claim_to_its_end(buy, drain, cancel, show, app):
    buy("auth0|7", quantity=3, reference="cart-1")
    assert show(1).json["status"] == "QUEUED"
    drain()
    order = show(1).json
    assert {
        "id": 1, "status": "CONFIRMED", "userId": "auth0|7", "productId": 1, "quantity": 3,
        "cancelledQuantity": 0, "unitPriceCents": 99_999, "currency": "USD",
        "reference": "cart-1", "endedAt": None, "heldUntil": None, "payment": None,
    }.items() <= order.items()  # fmt: skip
    part = cancel(1, quantity=1)
    assert (part.status_code, part.json["cancelledQuantity"]) == (200, 1)
    assert (part.json["status"], part.json["endedAt"]) == ("CONFIRMED", None)
    assert proved(app) == 98
    too_many = cancel(1, quantity=3)
    assert (too_many.status_code, too_many.json["code"]) == (409, "too_many_units")
    rest = cancel(1)
    assert (rest.json["status"], rest.json["cancelledQuantity"]) == ("CANCELLED", 3)
    assert rest.json["endReason"] == "returned"
    again = cancel(1)
    assert (again.status_code, again.json["code"]) == (409, "already_cancelled")
    assert proved(app) == 100
    assert show(1).json == rest.json


def test_user_ids_are_texts(buy, drain, show):
    buy(42)
    drain()
    assert show(1).json["userId"] == "42"


def test_what_a_shopper_sees_of_a_part(buy, drain, cancel, client):
    buy(1, quantity=2)
    drain()
    cancel(1, quantity=1)
    (listed,) = client.get("/purchase/orders/1").json
    assert (listed["status"], listed["quantity"], listed["cancelledQuantity"]) == (
        "CONFIRMED", 2, 1,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"reason": ""}, "reason"),
        ({"reason": None}, "reason"),
        ({"reason": "x" * 501}, "reason"),
        ({"quantity": 0}, "quantity"),
        ({"quantity": "1"}, "quantity"),
        ({"quantity": True}, "quantity"),
        ({"quantity": 1.0}, "quantity"),
        ({"units": 1}, "units"),
    ],
)
def test_bad_input_changes_nothing(buy, drain, cancel, app, body, field):
    buy(1, quantity=2)
    drain()
    answer = cancel(1, **body)
    assert (answer.status_code, answer.json["field"]) == (400, field)
    assert proved(app) == 98


@pytest.mark.parametrize("order_id", ["0", "2", "9007199254740993", "99999999999999999999"])
def test_an_unknown_order_is_404(cancel, show, order_id):
    for answer in (cancel(order_id), show(order_id)):
        assert (answer.status_code, answer.json["code"]) == (404, "unknown_order")


def test_a_key_cancels_once_and_answers_alike(buy, drain, cancel, app):
    buy(1, quantity=3)
    buy(2, quantity=3)
    drain()
    first = cancel(1, key="k", quantity=1)
    again = cancel(1, key="k", quantity=1)
    assert again.json == first.json
    assert again.headers["Idempotent-Replayed"] == "true"
    assert cancel(1, key="k", quantity=2).status_code == 422
    # A key is the order's own.
    assert cancel(2, key="k", quantity=1).status_code == 200
    # What was refused is not kept: it may do later.
    assert cancel(1, key="many", quantity=3).status_code == 409
    assert cancel(1, key="many", quantity=2).status_code == 200
    assert proved(app) == 100 - 2


def test_many_at_once_under_one_key_and_under_none(buy, drain, app, admin_headers):
    buy(1, quantity=3)
    drain()

    def attempt(key):
        headers = admin_headers | ({"Idempotency-Key": key} if key else {})
        body = {"reason": "x", "quantity": 1}
        client = app.test_client()
        return client.post("/orders/1/cancel", json=body, headers=headers).status_code

    answers = at_once(attempt, ["k", "k", "k", "", "", ""])
    (under_key,), others = set(answers[:3]), sorted(answers[3:])
    # One act under the key and two besides; or the three others came first, and nothing was left.
    assert (under_key, others) in ((200, [200, 200, 409]), (409, [200, 200, 200]))
    assert proved(app) == 100


def test_a_queued_order_is_cancelled_as_soon_as_it_is_stored(buy, drain, cancel, show, app):
    buy(1, quantity=3)
    first = cancel(1, key="k", quantity=1)
    assert (first.status_code, first.json["status"], first.json["cancelling"]) == (202, "QUEUED", 1)
    again = cancel(1, key="k", quantity=1)
    assert (again.status_code, again.json) == (202, first.json)
    assert cancel(1, quantity=3).json["code"] == "too_many_units"
    assert cancel(1).json["cancelling"] == 3
    assert cancel(1).json["code"] == "already_cancelled"
    assert show(1).json["cancelling"] == 3
    drain()
    with app.app_context():
        assert intents.apply_open() == 1
        assert intents.apply_open() == 0
    order = show(1).json
    assert (order["status"], order["cancelledQuantity"]) == ("CANCELLED", 3)
    assert "cancelling" not in order
    assert proved(app) == 100


def test_two_cancel_parts_of_a_queued_order_at_once(buy, drain, app, admin_headers):
    buy(1, quantity=3)

    def attempt(_):
        body = {"reason": "x", "quantity": 2}
        client = app.test_client()
        return client.post("/orders/1/cancel", json=body, headers=admin_headers).status_code

    assert sorted(at_once(attempt, range(4))) == [202, 409, 409, 409]
    drain()
    with app.app_context():
        intents.apply_open()
    assert proved(app) == 99


def test_an_order_that_is_stored_while_it_is_cancelled_is_cancelled(
    buy, drain, cancel, show, monkeypatch, app
):
    """The drain commits between the look for the order and the look into Redis, or right after."""
    waiting_order = stock.waiting_order
    buy(1)
    buy(2)

    def drained_before(order_id):
        monkeypatch.setattr(stock, "waiting_order", waiting_order)
        drain()
        return waiting_order(order_id)

    monkeypatch.setattr(stock, "waiting_order", drained_before)
    assert cancel(1).status_code == 200
    buy(3)

    def drained_after(order_id):
        monkeypatch.setattr(stock, "waiting_order", waiting_order)
        found = waiting_order(order_id)
        drain()
        return found

    monkeypatch.setattr(stock, "waiting_order", drained_after)
    assert cancel(3).status_code == 202
    assert [show(number).json["status"] for number in (1, 2, 3)] == [
        "CANCELLED", "CONFIRMED", "CANCELLED",
    ]  # fmt: skip
    assert proved(app) == 99


def test_a_rebuild_stores_what_waits_and_then_cancels_it(buy, cancel, show, app):
    buy(1, quantity=2)
    buy(2, quantity=2)
    assert cancel(1).status_code == 202
    with app.app_context():
        recovery.rebuild(CLI)
        intents.apply_open()
    assert [show(number).json["status"] for number in (1, 2)] == ["CANCELLED", "CONFIRMED"]
    assert proved(app) == 98


def test_after_a_reset_an_intent_of_the_old_sale_means_nobody(buy, drain, cancel, show, app):
    buy(1)
    assert cancel(1).status_code == 202
    with app.app_context():
        recovery.reset(CLI)
    buy(2)
    drain()
    with app.app_context():
        assert intents.apply_open() == 0
    assert show(1).json["status"] == "CONFIRMED"


def refuse(app, order_id):
    with app.app_context():
        db.session.execute(
            text(f"ALTER TABLE orders ADD CONSTRAINT refused CHECK (id <> {order_id}) NOT VALID")
        )
        db.session.commit()


@pytest.fixture
def refusing(app):
    refuse(app, 1)
    yield
    with app.app_context():
        db.session.execute(text("ALTER TABLE orders DROP CONSTRAINT IF EXISTS refused"))
        db.session.commit()


@pytest.mark.usefixtures("refusing")
def test_an_intent_waits_for_the_decision_on_a_dead_letter(buy, drain, cancel, show, app):
    buy(1, quantity=2)
    assert cancel(1, quantity=1).status_code == 202
    drain()
    assert cancel(1).json["code"] == "order_failed"
    with app.app_context():
        assert intents.apply_open() == 0
        db.session.execute(text("ALTER TABLE orders DROP CONSTRAINT refused"))
        db.session.commit()
        letter = db.session.scalar(db.select(DeadLetter.id))
        assert deadletters.replay([letter], "again", CLI)[0].done
        assert intents.apply_open() == 1
    assert show(1).json["cancelledQuantity"] == 1
    assert proved(app) == 99


@pytest.mark.usefixtures("refusing")
def test_an_abandoned_letter_gives_its_units_back_once(buy, drain, cancel, app):
    buy(1, quantity=2)
    assert cancel(1).status_code == 202
    drain()
    with app.app_context():
        letter = db.session.scalar(db.select(DeadLetter.id))
        deadletters.abandon([letter], "no", CLI)
        assert db.session.scalar(db.select(OrderIntent.refusal)) == "the order was abandoned"
    assert cancel(1).json["code"] == "already_cancelled"
    assert proved(app) == 100


def test_without_redis_a_stored_order_is_cancelled_and_its_units_follow(
    buy, drain, cancel, show, app, monkeypatch
):
    buy(1, quantity=2, key="shopper")
    drain()

    def away(*args, **more):
        raise Unavailable("gone")

    with monkeypatch.context() as patch:
        for name in ("move_all", "waiting_order"):
            patch.setattr(stock, name, away)
        assert cancel(1, key="k").json["status"] == "CANCELLED"
        assert cancel(1, key="k").status_code == 200
        assert cancel(1).json["code"] == "already_cancelled"
        assert show(1).status_code == 200
        # Nobody can tell whether it waits there.
        for answer in (cancel(2), show(2)):
            assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
    assert free() == 98
    assert cancel(1, key="k").headers["Idempotent-Replayed"] == "true"
    assert proved(app) == 100
    assert buy(1, quantity=2, key="shopper").json["code"] == "order_ended"


def test_cancels_and_a_rebuild_at_once(buy, drain, app, monkeypatch):
    for user in range(1, 7):
        buy(user, quantity=3)
    drain()
    refused = []

    def give_back(order_id):
        with app.app_context():
            for _ in range(3):
                try:
                    cancelling.cancel(order_id, "x", CLI, units=1)
                except Conflict as error:
                    refused.append(error.code)

    rebuilding = threading.Thread(target=lambda: rebuild(app))
    rebuilding.start()
    at_once(give_back, range(1, 7))
    rebuilding.join()
    assert refused == []
    with app.app_context():
        while finish_pending():
            pass
        bought = stock.client.keys("*bought*")
        assert [stock.client.hgetall(name) for name in bought] == []
    assert proved(app) == 100


def rebuild(app):
    with app.app_context():
        recovery.rebuild(CLI)
        recovery.rebuild(CLI)


def test_lists_by_every_filter_and_cursor(client, buy, drain, cancel, admin_headers):
    for number in range(1, 6):
        buy("ann" if number % 2 else 42, reference=f"cart-{number % 2}")
    drain()
    buy("ann")
    cancel(2)

    def ids(query):
        answer = client.get(f"/orders?{query}", headers=admin_headers)
        assert answer.status_code == 200, answer.json
        return [order["id"] for order in answer.json["orders"]], answer.json["next"]

    assert ids("") == ([6, 5, 4, 3, 2, 1], None)
    assert ids("limit=4") == ([6, 5, 4, 3], "3")
    assert ids("limit=4&cursor=3") == ([2, 1], None)
    assert ids("userId=ann")[0] == [6, 5, 3, 1]
    assert ids("userId=42&status=CONFIRMED")[0] == [4]
    assert ids("reference=cart-0")[0] == [4, 2]
    assert ids("status=CANCELLED")[0] == [2]
    assert ids("status=QUEUED")[0] == [6]
    assert ids("productId=2")[0] == []
    assert ids("status=HELD")[0] == []


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("userId=", "userId"), ("userId=..", "userId"), ("reference=%00", "reference"),
        ("productId=x", "productId"), ("status=confirmed", "status"), ("limit=501", "limit"),
        ("limit=0", "limit"), ("cursor=x", "cursor"), ("cursor=", "cursor"),
        ("user=1", "user"), ("userId=1&userId=2", "userId"),
    ],
)  # fmt: skip
def test_a_list_refuses_what_it_does_not_know(client, admin_headers, query, field):
    answer = client.get(f"/orders?{query}", headers=admin_headers)
    assert (answer.status_code, answer.json["field"]) == (400, field)


ROUTES = {
    "orders:read": [
        ("GET", "/orders"),
        ("GET", "/orders/1"),
        ("GET", "/orders/events"),
        ("GET", "/orders/bulk-cancels/1"),
    ],
    "orders:write": [
        ("POST", "/orders/1/cancel"),
        ("POST", "/orders/1/confirm"),
        ("POST", "/orders/1/release"),
        ("POST", "/orders/1/extend"),
        ("POST", "/orders/bulk-cancels"),
        ("DELETE", "/orders/bulk-cancels/1"),
    ],
    "products:write": [
        ("POST", "/products"),
        ("PATCH", "/products/1"),
        ("POST", "/products/restock"),
        ("POST", "/sale/brake"),
    ],
    # Webhooks carry what every order holds, to wherever they are told.
    "*": [("GET", "/webhooks"), ("POST", "/webhooks"), ("POST", "/webhooks/1/test")],
}


@pytest.mark.parametrize("scope", ROUTES)
def test_a_token_may_do_what_its_scopes_say(app, client, scope):
    with app.app_context():
        _, secret = tokens.create("program", [scope], CLI)
    for needed, routes in ROUTES.items():
        for method, path in routes:
            headers = {"Authorization": f"Bearer {secret}"}
            answer = client.open(path, method=method, headers=headers)
            if scope in (needed, "*"):
                assert answer.status_code not in (401, 403), (method, path)
            else:
                assert (answer.status_code, answer.json["scope"]) == (403, needed), (method, path)
                assert 'error="insufficient_scope"' in answer.headers["WWW-Authenticate"]


def test_a_new_token_names_its_scopes_and_an_old_one_may_do_all(app, runner, client):
    assert runner.invoke(args=["token", "create", "x"]).exit_code == 2
    assert runner.invoke(args=["token", "create", "x", "--scope", "orders:delete"]).exit_code == 2
    made = runner.invoke(args=["token", "create", "x", "--scope", "orders:read"])
    assert made.exit_code == 0
    assert "orders:read" in runner.invoke(args=["token", "list"]).output
    secret = made.output.split()[-1]
    with app.app_context():
        # As 0.1.0 writes one.
        db.session.execute(
            text(
                "INSERT INTO api_tokens (name, token_hash, created_by) VALUES ('old', :hash, 'x')"
            ),
            {"hash": tokens.hash_token("fst_old")},
        )
        db.session.commit()
    for token, status in ((secret, 403), ("fst_old", 415)):
        headers = {"Authorization": f"Bearer {token}"}
        assert client.post("/orders/1/cancel", headers=headers).status_code == status


def test_the_order_counts_its_acts(buy, drain, cancel, app):
    buy(1, quantity=3)
    drain()
    for _ in range(3):
        cancel(1, quantity=1)
    with app.app_context():
        assert db.session.get_one(Order, 1).acts == 3


def test_what_was_given_back_early_returns_together(buy, drain, cancel, app, monkeypatch):
    """In one round trip: Redis may be a cluster, each of whose nodes waits for its replica."""
    for user in range(1, 31):
        buy(user, quantity=3)
        assert cancel(user, quantity=1).status_code == 202
        assert cancel(user, quantity=1).status_code == 202
    drain()
    move_all, trips = stock.move_all, []
    monkeypatch.setattr(
        stock, "move_all", lambda sale, told: trips.append(len(told)) or move_all(sale, told)
    )
    with app.app_context():
        assert intents.apply_open() == 30
    assert trips == [60]
    assert proved(app) == 70


def test_where_redis_is_away_the_units_return_later(buy, drain, cancel, app, monkeypatch):
    for user in range(1, 4):
        buy(user)
        assert cancel(user).status_code == 202
    drain()

    def away(*_):
        raise Unavailable

    with app.app_context(), monkeypatch.context() as patched:
        patched.setattr(stock, "move_all", away)
        assert intents.apply_open() == 3
        assert free() == 97
        assert intents.apply_open() == 0
    with app.app_context():
        assert finish_pending() == 3
    assert proved(app) == 100


def test_what_was_accepted_early_comes_first(buy, drain, cancel, show, app):
    """An act that meets the stored order before the sweeper does can't push it aside."""
    buy(1, quantity=3)
    assert cancel(1, quantity=2).status_code == 202
    drain()
    assert cancel(1, quantity=2).json["code"] == "too_many_units"
    assert cancel(1, quantity=1).json["cancelledQuantity"] == 3
    with app.app_context():
        assert intents.apply_open() == 0
    assert show(1).json["status"] == "CANCELLED"
    assert proved(app) == 100
