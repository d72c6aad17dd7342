"""Products and restocks over the API."""

from datetime import timedelta

import pytest
from crowd import at_once
from people import send
from sqlalchemy import func, select, update

from app.audit import CLI
from app.books import ledger, recovery
from app.extensions import db, stock
from app.models import AuditEntry, Product, RequestKey, StockMovement
from app.problems import Conflict, Unavailable, UnknownProduct
from app.products import catalogue, importing, movements, sale, terms
from app.stock.keys import KEYS

LAMP = {"name": "Lamp", "priceCents": 1999, "currency": "EUR", "stock": 3}


def test_create_and_buy_at_once(client, buy, admin_headers):
    answer = client.post("/products", json=LAMP, headers=admin_headers)
    assert answer.status_code == 201
    assert answer.headers["Location"] == "/products/2"
    assert answer.json == {
        "id": 2, "name": "Lamp", "priceCents": 1999, "currency": "EUR", "opensAt": None,
        "closesAt": None, "perUserLimit": None, "maxQuantity": 10, "paused": False,
        "holdSeconds": None, "sku": None, "visibility": "listed", "archived": False,
        "stockRemaining": 3,
        "braked": False, "currencyDigits": 2,
    }  # fmt: skip
    assert buy(1, product_id=2).status_code == 200
    assert client.get(answer.headers["Location"]).json["stockRemaining"] == 2
    assert [product["id"] for product in client.get("/products").json] == [1, 2]


def test_a_name_is_one_line_on_every_road(app, client, admin, admin_headers):
    with app.app_context():
        audited = db.session.scalar(select(func.count()).select_from(AuditEntry))
    odd = "Lamp\nFan"
    words = "name must be one line, without control characters"
    for answer in (
        client.post("/products", json=LAMP | {"name": odd}, headers=admin_headers),
        client.patch("/products/1", json={"name": odd}, headers=admin_headers),
    ):
        assert (answer.status_code, answer.json["field"]) == (400, "name")
        assert answer.json["error"] == words
    reason = {"productId": 1, "amount": 1, "reason": odd}
    answer = client.post("/products/restock", json=reason, headers=admin_headers)
    assert (answer.status_code, answer.json["field"]) == (400, "reason")
    answer = client.post(
        "/webhooks", json={"url": "https://example.com", "description": odd}, headers=admin_headers
    )
    assert (answer.status_code, answer.json["field"]) == (400, "description")
    with app.app_context():
        (fault,) = importing.read(f'name,price,currency,stock\n"{odd}",1,EUR,1\n'.encode()).faults
    assert words in fault.message
    answer = send(admin, "/admin/products/1/restock", amount="1", reason=odd)
    assert "The reason must be one line, without control characters" in answer.text
    answer = send(admin, "/admin/staff/tokens", name=odd, scope="*")
    assert "The name must be one line, without control characters" in answer.text
    answer = send(admin, "/admin/staff/", email="a\x1b@example.com", role="support")
    assert "email must be an e-mail address" in answer.text
    with app.app_context():
        assert db.session.scalar(select(func.count()).select_from(AuditEntry)) == audited


def test_a_product_whose_name_has_two_lines_since_earlier_is_sold_and_changed_as_any_other(
    client, admin, admin_headers, app, buy, drain
):
    with app.app_context():
        db.session.execute(update(Product).values(name="Lamp\nFan"))
        db.session.commit()
    assert client.get("/products/1").json["name"] == "Lamp\nFan"
    assert buy(1).status_code == 200
    drain()
    for path in ("/admin/", "/admin/products/1", "/admin/products/1/edit", "/admin/orders/1"):
        assert "Lamp\nFan" in admin.get(path).text, path
    assert '"Lamp\nFan"' in admin.get("/admin/orders/orders.csv").text
    changed = client.patch("/products/1", json={"priceCents": 1}, headers=admin_headers)
    assert (changed.status_code, changed.json["name"]) == (200, "Lamp\nFan")


def test_metrics_narrow_to_a_product(client, buy, admin_headers, drain):
    client.post("/products", json=LAMP, headers=admin_headers)
    buy(1, product_id=2)
    buy(2, product_id=1)
    drain()
    buy(3, product_id=2)
    assert client.get("/purchase/metrics?productId=2").json == {
        "stock_remaining": 1, "queue_depth": 1, "total_processed": 1,
    }  # fmt: skip
    assert client.get("/purchase/metrics").json == {
        "stock_remaining": 100, "queue_depth": 1, "total_processed": 2,
    }  # fmt: skip


def test_change_terms(client, admin_headers, app):
    change = {
        "name": "Better lamp", "priceCents": 5, "currency": "USD", "perUserLimit": 2,
        "maxQuantity": 2, "paused": True, "opensAt": "2030-01-01T01:00:00+01:00",
        "closesAt": "2030-01-02T00:00:00Z",
    }  # fmt: skip
    answer = client.patch("/products/1", json=change, headers=admin_headers)
    assert answer.status_code == 200
    assert answer.json == change | {
        "id": 1, "stockRemaining": 100, "opensAt": "2030-01-01T00:00:00.000Z",
        "closesAt": "2030-01-02T00:00:00.000Z", "braked": False, "sku": None,
        "visibility": "listed", "archived": False, "currencyDigits": 2, "holdSeconds": None,
    }  # fmt: skip
    answer = client.patch("/products/1", json={"opensAt": None}, headers=admin_headers)
    assert answer.json["opensAt"] is None
    with app.app_context():
        entry = db.session.query(AuditEntry).order_by(AuditEntry.id.desc()).first()
    assert (entry.action, entry.actor, entry.after) == (
        "product.change", "token ADMIN_API_TOKEN", {"opensAt": None},
    )  # fmt: skip


def test_stock_is_not_a_term(client, admin_headers):
    answer = client.patch("/products/1", json={"stock": 5}, headers=admin_headers)
    assert (answer.status_code, answer.json["field"]) == (400, "stock")
    answer = client.patch("/products/9", json={"name": "x"}, headers=admin_headers)
    assert (answer.status_code, answer.json["code"]) == (404, "unknown_product")


def test_admin_routes_need_a_token(client):
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic abc"}):
        for method, path in (
            ("post", "/products"),
            ("patch", "/products/1"),
            ("post", "/products/restock"),
        ):
            answer = getattr(client, method)(path, json={}, headers=headers)
            assert (answer.status_code, answer.json["code"]) == (401, "unauthorized")
            assert answer.headers["WWW-Authenticate"].startswith("Bearer")


def test_restock(client, buy, admin_headers, app):
    buy(1, quantity=5)
    answer = client.post(
        "/products/restock",
        json={"productId": 1, "amount": 50, "reason": "second truck"},
        headers=admin_headers,
    )
    assert (answer.status_code, answer.json) == (
        200,
        {"productId": 1, "amount": 50, "stock_remaining": 145},
    )
    with app.app_context():
        movement = db.session.query(StockMovement).order_by(StockMovement.id.desc()).first()
    assert (movement.kind, movement.units, movement.reason) == ("restock", 50, "second truck")
    assert movement.applied_at is not None
    assert movement.stock_after == 145


def test_a_restock_with_a_key_happens_once(client, admin_headers):
    headers = admin_headers | {"Idempotency-Key": "truck-2"}
    body = {"productId": 1, "amount": 50}
    answers = at_once(
        lambda _: client.application.test_client().post(
            "/products/restock", json=body, headers=headers
        ),
        range(8),
    )
    assert {answer.status_code for answer in answers} == {200}
    assert {answer.json["stock_remaining"] for answer in answers} == {150}
    replays = [answer for answer in answers if "Idempotent-Replayed" in answer.headers]
    assert len(replays) == 7
    for other in ({"amount": 51}, {"reason": "another"}):
        answer = client.post("/products/restock", json=body | other, headers=headers)
        assert (answer.status_code, answer.json["code"]) == (422, "idempotency_mismatch")


def test_what_a_crash_left_pending_is_finished_once(app):
    """The row exists, Redis was never told; and: Redis was told, the mark is missing."""
    with app.app_context():
        for told in (False, True):
            movement = StockMovement(product_id=1, kind="restock", units=5, actor="test")
            db.session.add(movement)
            db.session.commit()
            if told:
                stock.move(stock.generation(), movement.id, 1, 5)
        assert movements.finish_pending() == 2
        assert movements.finish_pending() == 0
        assert stock.view([1]).products[1]["free"] == 110


def test_a_redis_that_is_away_does_not_keep_the_sweeper_and_none_waits_for_ever(app, monkeypatch):
    """After some failures it goes on with the others the next time, not with the same ones."""
    monkeypatch.setattr(movements, "FAILED_AT_ONCE", 2)
    tried = []

    def fail(generation, movement_id, *_):
        tried.append(movement_id)
        raise Unavailable("Redis is away")

    with app.app_context():
        for _ in range(3):
            db.session.add(StockMovement(product_id=1, kind="restock", units=5, actor="test"))
        db.session.commit()
        first, second, third = db.session.scalars(
            select(StockMovement.id).where(StockMovement.applied_at.is_(None)).order_by("id")
        )
        finisher = movements.Finisher()
        with monkeypatch.context() as patch:
            patch.setattr(stock, "move", fail)
            for _ in range(3):
                with pytest.raises(Unavailable):
                    finisher.run_once()
        assert tried == [first, second, third, first, second]
        finisher.run_once()
        finisher.run_once()
        assert stock.view([1]).products[1]["free"] == 115


def test_terms_that_never_reached_redis_are_published(app, buy):
    with app.app_context():
        product = db.session.get(Product, 1)
        product.paused = True
        product.version += 1
        db.session.commit()
        assert buy(1).status_code == 200
        assert sale.publish_stale() == 1
        assert sale.publish_stale() == 0
        assert buy(2).json["code"] == "paused"


def test_an_older_version_never_overwrites_a_newer_one(app):
    known = {
        "opens": None,
        "closes": None,
        "pause": 0,
        "cap": None,
        "max": 10,
        "price": "1 USD",
        "hold": None,
    }
    assert stock.put_product(1, 7, known | {"pause": 1})
    assert not stock.put_product(1, 6, known)
    assert stock.view([1]).products[1]["pause"] == 1


def test_a_correction_never_takes_more_than_is_free(app):
    with app.app_context():
        assert movements.correct(1, -40, "broken", CLI) == 60
        with pytest.raises(Conflict):
            movements.correct(1, -61, "more broken", CLI)
        assert movements.finish_pending() == 0
        assert stock.view([1]).products[1]["free"] == 60


def version(client, product_id: int = 1) -> str:
    return client.get(f"/products/{product_id}").headers["ETag"]


def test_a_change_for_a_version_that_is_gone_changes_nothing(client, admin_headers):
    first = version(client)
    changed = client.patch(
        "/products/1", json={"priceCents": 5}, headers=admin_headers | {"If-Match": first}
    )
    assert changed.status_code == 200
    assert changed.headers["ETag"] == version(client) != first
    stale = client.patch(
        "/products/1", json={"name": "Mine"}, headers=admin_headers | {"If-Match": first}
    )
    assert (stale.status_code, stale.json["code"]) == (409, "stale_version")
    # What holds now is in the answer, with its version.
    assert stale.json["product"] == client.get("/products/1").json == changed.json
    assert stale.headers["ETag"] == changed.headers["ETag"]
    again = client.patch(
        "/products/1",
        json={"name": "Mine"},
        headers=admin_headers | {"If-Match": stale.headers["ETag"]},
    )
    assert (again.status_code, again.json["name"]) == (200, "Mine")


def test_purchases_and_restocks_make_no_new_version(client, admin_headers, buy):
    first = version(client)
    buy(1)
    client.post("/products/restock", json={"productId": 1, "amount": 5}, headers=admin_headers)
    client.patch("/products/1", json={"name": "Flash-sale item"}, headers=admin_headers)
    assert version(client) == first


@pytest.mark.parametrize("text", ["*", '"1"', 'W/"1"', '"7", "1"', '"7" ,W/"1"'])
def test_versions_that_match(client, admin_headers, text):
    headers = admin_headers | {"If-Match": text}
    assert client.patch("/products/1", json={"priceCents": 5}, headers=headers).status_code == 200


@pytest.mark.parametrize("text", ["", " ", "1", "'1'", '"x"', '"1', '"1",', '"-1"', '"' + "9" * 99])
def test_a_version_that_is_none_is_refused(client, admin_headers, text):
    headers = admin_headers | {"If-Match": text}
    answer = client.patch("/products/1", json={"priceCents": 5}, headers=headers)
    assert (answer.status_code, answer.json["field"]) == (400, "If-Match")
    assert version(client) == '"1"'


def test_of_two_changes_of_one_version_one_is_made(client, admin_headers):
    headers = admin_headers | {"If-Match": version(client)}
    answers = at_once(
        lambda price: client.application.test_client().patch(
            "/products/1", json={"priceCents": price}, headers=headers
        ),
        range(1, 9),
    )
    assert sorted(answer.status_code for answer in answers) == [200] + [409] * 7


def create(client, admin_headers, key: str, **terms):
    headers = admin_headers | {"Idempotency-Key": key}
    return client.application.test_client().post("/products", json=LAMP | terms, headers=headers)


def test_a_product_with_a_key_is_created_once(client, admin_headers, buy):
    answers = at_once(lambda _: create(client, admin_headers, "lamp"), range(8))
    assert {answer.status_code for answer in answers} == {201}
    assert sum("Idempotent-Replayed" in answer.headers for answer in answers) == 7
    assert len({answer.data for answer in answers}) == 1
    assert {answer.headers["Location"] for answer in answers} == {"/products/2"}
    # The first answer comes again, whatever has become of the product.
    buy(1, product_id=2)
    client.patch("/products/2", json={"name": "Other"}, headers=admin_headers)
    again = create(client, admin_headers, "lamp")
    assert (again.data, again.headers["ETag"]) == (answers[0].data, '"1"')
    for changed in ({"stock": 4}, {"name": "Lamb"}, {"paused": True}):
        answer = create(client, admin_headers, "lamp", **changed)
        assert (answer.status_code, answer.json["code"]) == (422, "idempotency_mismatch")
    assert create(client, admin_headers, "another").json["id"] == 3
    assert len(client.get("/products").json) == 3


def test_a_creation_that_was_refused_leaves_its_key_free(client, admin_headers):
    assert create(client, admin_headers, "lamp", priceCents=-1).status_code == 400
    window = {"opensAt": "2030-01-02T00:00:00Z", "closesAt": "2030-01-01T00:00:00Z"}
    assert create(client, admin_headers, "lamp", **window).json["field"] == "closesAt"
    generation = stock.client.getdel(KEYS.generation)
    assert create(client, admin_headers, "lamp").status_code == 503
    stock.client.set(KEYS.generation, generation)
    answer = create(client, admin_headers, "lamp")
    assert answer.status_code == 201
    assert "Idempotent-Replayed" not in answer.headers


@pytest.mark.parametrize("key", ["", "ä", "a b", "x" * 256])
@pytest.mark.parametrize("path", ["/products", "/products/restock"])
def test_a_key_that_is_none_is_refused(client, admin_headers, path, key):
    body = LAMP if path == "/products" else {"productId": 1, "amount": 1}
    headers = admin_headers | {"Idempotency-Key": key}
    answer = client.post(path, json=body, headers=headers)
    assert (answer.status_code, answer.json["field"]) == (400, "Idempotency-Key")


class Killed(BaseException):
    """The process is gone: nothing after it happens."""


@pytest.mark.parametrize("came", ["nothing", "the terms", "all of it"])
def test_killed_between_postgresql_and_redis_the_same_key_finishes(
    client, admin_headers, app, monkeypatch, buy, came
):
    real = stock.put_new

    def die(generation, products):
        products = list(products)
        if came == "the terms":
            stock.put_product(*products[0][:3])
        if came == "all of it":
            real(generation, products)
        raise Killed

    with monkeypatch.context() as patch, app.app_context():
        patch.setattr(stock, "put_new", die)
        with pytest.raises(Killed):
            catalogue.create(terms.read_new(LAMP), CLI, "lamp")
    answer = create(client, admin_headers, "lamp")
    assert (answer.status_code, answer.json["stockRemaining"]) == (201, 3)
    assert answer.headers["Idempotent-Replayed"] == "true"
    assert client.get("/products/2").json == answer.json
    assert buy(1, product_id=2).status_code == 200
    with app.app_context():
        assert movements.finish_pending() == 0


def test_keys_are_forgotten_after_30_days(client, admin_headers, app):
    create(client, admin_headers, "lamp")
    with app.app_context():
        for days, made in ((29, 2), (31, 3)):
            db.session.execute(
                update(RequestKey).values(created_at=func.now() - timedelta(days=days))
            )
            db.session.commit()
            assert create(client, admin_headers, "lamp").json["id"] == made


def test_a_reset_forgets_the_keys_of_products(client, admin_headers, app):
    create(client, admin_headers, "lamp")
    with app.app_context():
        recovery.reset(CLI)
    answer = create(client, admin_headers, "lamp", stock=9)
    assert (answer.status_code, answer.json["stockRemaining"]) == (201, 9)


def test_a_pending_correction_that_is_too_large_by_now_goes(app):
    """Left by a crash before Redis was told, and the units were sold. Others are applied."""
    with app.app_context():
        for kind, units in (("correction", -101), ("restock", 7)):
            db.session.add(
                StockMovement(product_id=1, kind=kind, units=units, reason="r", actor="test")
            )
        db.session.commit()
        assert movements.finish_pending() == 2
        assert stock.view([1]).products[1]["free"] == 107
        left = db.session.scalars(select(StockMovement).where(StockMovement.actor == "test"))
        assert [movement.units for movement in left] == [7]
        entries = select(AuditEntry).where(AuditEntry.action == "movement.refused")
        refused = db.session.scalar(entries.order_by(AuditEntry.id.desc()))
        assert (refused.target, refused.before, refused.after) == (
            "product 1", {"units": -101}, {"free": 100},
        )  # fmt: skip
        assert ledger.check(rows=True).ok


def test_a_movement_of_a_product_that_redis_lacks_publishes_it(app, buy):
    with app.app_context():
        stock.client.delete(KEYS.product(1))
        stock.client.srem(KEYS.products, 1)
        assert movements.restock(1, 3, None, CLI).free == 3
    assert buy(1).status_code == 200


@pytest.mark.parametrize("act", [movements.restock, movements.correct])
def test_no_movement_of_a_product_that_there_is_not(app, act):
    with app.app_context():
        with pytest.raises(UnknownProduct):
            act(99, 1, "r", CLI)
        assert db.session.scalar(select(func.count()).select_from(StockMovement)) == 1
