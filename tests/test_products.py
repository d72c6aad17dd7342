"""Products and restocks over the API."""

from crowd import at_once

from app.extensions import db, stock
from app.models import AuditEntry, StockMovement

LAMP = {"name": "Lamp", "priceCents": 1999, "currency": "EUR", "stock": 3}


def test_create_and_buy_at_once(client, buy, admin_headers):
    answer = client.post("/products", json=LAMP, headers=admin_headers)
    assert answer.status_code == 201
    assert answer.headers["Location"] == "/products/2"
    assert answer.json == {
        "id": 2, "name": "Lamp", "priceCents": 1999, "currency": "EUR", "opensAt": None,
        "closesAt": None, "perUserLimit": None, "maxQuantity": 10, "paused": False,
        "stockRemaining": 3,
    }  # fmt: skip
    assert buy(1, product_id=2).status_code == 200
    assert client.get(answer.headers["Location"]).json["stockRemaining"] == 2
    assert [product["id"] for product in client.get("/products").json] == [1, 2]


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
    terms = {
        "name": "Better lamp", "priceCents": 5, "currency": "USD", "perUserLimit": 2,
        "maxQuantity": 2, "paused": True, "opensAt": "2030-01-01T01:00:00+01:00",
        "closesAt": "2030-01-02T00:00:00Z",
    }  # fmt: skip
    answer = client.patch("/products/1", json=terms, headers=admin_headers)
    assert answer.status_code == 200
    assert answer.json == terms | {
        "id": 1, "stockRemaining": 100, "opensAt": "2030-01-01T00:00:00.000Z",
        "closesAt": "2030-01-02T00:00:00.000Z",
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
    answer = client.post("/products/restock", json={"productId": 1, "amount": 51}, headers=headers)
    assert (answer.status_code, answer.json["code"]) == (422, "idempotency_mismatch")


def test_what_a_crash_left_pending_is_finished_once(app):
    """The row exists, Redis was never told; and: Redis was told, the mark is missing."""
    from app.products import inventory

    with app.app_context():
        for told in (False, True):
            movement = StockMovement(product_id=1, kind="restock", units=5, actor="test")
            db.session.add(movement)
            db.session.commit()
            if told:
                stock.move(stock.generation(), movement.id, 1, 5)
        assert inventory.finish_pending() == 2
        assert inventory.finish_pending() == 0
        assert stock.view([1]).products[1]["free"] == 110


def test_terms_that_never_reached_redis_are_published(app, buy):
    from app.models import Product
    from app.products import inventory

    with app.app_context():
        product = db.session.get(Product, 1)
        product.paused = True
        product.version += 1
        db.session.commit()
        assert buy(1).status_code == 200
        assert inventory.publish_stale() == 1
        assert inventory.publish_stale() == 0
        assert buy(2).json["code"] == "paused"


def test_an_older_version_never_overwrites_a_newer_one(app):
    terms = {"opens": None, "closes": None, "pause": 0, "cap": None, "max": 10, "price": "1 USD"}
    assert stock.put_product(1, 7, terms | {"pause": 1})
    assert not stock.put_product(1, 6, terms)
    assert stock.view([1]).products[1]["pause"] == 1


def test_a_correction_never_takes_more_than_is_free(app):
    import pytest

    from app.audit import CLI
    from app.products import inventory

    with app.app_context():
        assert inventory.correct(1, -40, "broken", CLI) == 60
        with pytest.raises(inventory.Conflict):
            inventory.correct(1, -61, "more broken", CLI)
        assert inventory.finish_pending() == 0
        assert stock.view([1]).products[1]["free"] == 60
