"""Amounts of before ISO 4217's minor units: told, kept or rewritten, and never in silence."""

import pytest
from people import fields_of, send
from sqlalchemy import select, text

from app.audit import CLI
from app.books import ledger
from app.extensions import db, stock
from app.models import AuditEntry, Order, Product
from app.orders import cancelling
from app.problems import Conflict, UnknownProduct
from app.products import currency, sale
from app.stock.keys import KEYS


@pytest.fixture
def yen(app, client, admin_headers):
    """Product 2, whose 1500 yen a form of before has stored as hundredths: 150000."""
    body = {"name": "Fan", "priceCents": 150_000, "currency": "JPY", "stock": 10}
    client.post("/products", json=body, headers=admin_headers)
    with app.app_context():
        db.session.execute(text("UPDATE products SET minor_units = NULL"))
        db.session.commit()


def doubted(app) -> list[int]:
    with app.app_context():
        return [doubt.product_id for doubt in currency.doubts()]


def pause(client, admin_headers) -> None:
    client.patch("/products/2", json={"paused": True}, headers=admin_headers)


def test_only_other_digits_are_in_doubt(app, yen, admin, client):
    # Product 1 is in USD: hundredths are its minor unit.
    assert doubted(app) == [2]
    with app.app_context():
        (doubt,) = currency.doubts()
    assert (doubt.as_minor_units, doubt.as_hundredths) == ("JPY 150,000", "JPY 1,500")
    assert doubt.actor == "token ADMIN_API_TOKEN"
    for page in ("/admin/", "/admin/products/2"):
        assert "flask products currency 2" in admin.get(page).text
    assert "flask products currency" not in admin.get("/admin/products/1").text


def test_kept_as_it_is(app, yen, admin, runner):
    answer = runner.invoke(args=["products", "currency", "2", "--keep", "--yes"])
    assert (answer.exit_code, answer.output) == (0, "Product 2 costs JPY 150,000.\n")
    assert doubted(app) == []
    assert "flask products currency" not in admin.get("/admin/").text
    again = runner.invoke(args=["products", "currency", "2", "--keep", "--yes"])
    assert again.exit_code == 1


def test_rewritten_with_its_orders_in_postgres_and_redis(
    app, yen, client, buy, admin_headers, drain, runner
):
    for user in (7, 8):
        assert buy(user, product_id=2, key=f"k-{user}", reference="cart").status_code == 200
    drain()
    with app.app_context():
        cancelling.cancel(2, "x", CLI)
    pause(client, admin_headers)
    answer = runner.invoke(args=["products", "currency", "2", "--rewrite", "--yes"])
    assert answer.output == "Product 2 costs JPY 1,500; 2 orders were put right.\n"
    assert client.get("/products/2").json["priceCents"] == 1500
    assert client.get("/purchase/orders/7").json[0]["unitPriceCents"] == 1500
    replay = buy(7, product_id=2, key="k-7", reference="cart")
    assert (replay.json["unitPriceCents"], replay.headers["Idempotent-Replayed"]) == (1500, "true")
    # The key of an order that has ended still says so.
    assert buy(8, product_id=2, key="k-8", reference="cart").json["code"] == "order_ended"
    client.patch("/products/2", json={"paused": False}, headers=admin_headers)
    assert buy(9, product_id=2, expectedPriceCents=1500).status_code == 200
    assert doubted(app) == []
    with app.app_context():
        assert ledger.check().ok
        entry = db.session.scalar(
            select(AuditEntry)
            .where(AuditEntry.action == "product.currency")
            .order_by(AuditEntry.id.desc())
            .limit(1)
        )
        assert entry.before == {"priceCents": 150_000, "currency": "JPY"}
        assert entry.after == {"priceCents": 1500, "orders": 2, "from": "hundredths"}


def test_three_digits_are_rewritten_upwards(app, client, admin_headers, buy, drain):
    body = {"name": "Oud", "priceCents": 150, "currency": "KWD", "stock": 10}
    client.post("/products", json=body, headers=admin_headers)
    buy(7, product_id=2)
    drain()
    with app.app_context():
        db.session.execute(text("UPDATE products SET minor_units = NULL"))
        db.session.commit()
    pause(client, admin_headers)
    with app.app_context():
        assert currency.rewrite(2, CLI) == 1
        assert db.session.get(Product, 2).price_cents == 1500
        assert db.session.get(Order, 1).unit_price_cents == 1500


def test_nothing_is_rewritten_while_it_sells_or_orders_wait(
    app, yen, client, buy, admin_headers, drain
):
    buy(7, product_id=2)
    with app.app_context(), pytest.raises(Conflict, match="Pause"):
        currency.rewrite(2, CLI)
    pause(client, admin_headers)
    with app.app_context(), pytest.raises(Conflict, match="wait to be stored"):
        currency.rewrite(2, CLI)
    drain()
    with app.app_context():
        # A price in Redis that is older than PostgreSQL's could still be sold at.
        stock.client.hset(KEYS.product(2), "version", 1)
        with pytest.raises(Conflict, match="Pause"):
            currency.rewrite(2, CLI)
        sale.publish_stale()
        assert currency.rewrite(2, CLI) == 1


def test_amounts_that_can_not_be_hundredths_are_left(app, yen, client, buy, admin_headers, drain):
    client.patch("/products/2", json={"priceCents": 150_001}, headers=admin_headers)
    with app.app_context():
        db.session.execute(text("UPDATE products SET minor_units = NULL"))
        db.session.commit()
    buy(7, product_id=2)
    drain()
    pause(client, admin_headers)
    for price in (150_001, 150_000):
        with app.app_context():
            db.session.get(Product, 2).price_cents = price
            db.session.commit()
            with pytest.raises(Conflict, match="whole"):
                currency.rewrite(2, CLI)
            assert db.session.get(Order, 1).unit_price_cents == 150_001


def test_a_new_price_settles_it_where_nothing_was_sold(app, yen, client, admin_headers):
    client.patch("/products/2", json={"priceCents": 1500}, headers=admin_headers)
    assert doubted(app) == []


def test_a_new_price_settles_nothing_where_there_are_orders(app, yen, client, buy, admin_headers):
    buy(7, product_id=2)
    client.patch("/products/2", json={"priceCents": 1500}, headers=admin_headers)
    assert doubted(app) == [2]


def test_wrong_commands(app, yen, runner):
    def run(*words):
        return runner.invoke(args=["products", "currency", *words])

    shown = run()
    assert shown.exit_code == 0
    assert "JPY 150,000  (--keep)" in shown.output
    assert "JPY 1,500  (--rewrite)" in shown.output
    assert run("2", "--keep", "--rewrite").exit_code == 1
    assert run("--keep").exit_code == 1
    assert run("1", "--keep").exit_code == 1
    assert run("99", "--rewrite").exit_code == 1
    assert doubted(app) == [2]
    with app.app_context(), pytest.raises(UnknownProduct):
        currency.keep(99, CLI)


def test_money_on_forms_pages_and_sheets(app, client, admin, buy, drain):
    form = {"name": "Fan", "price": "1500", "currency": "jpy", "stock": "5", "max_quantity": "5"}
    assert send(admin, "/admin/products/new", **form).status_code == 302
    assert client.get("/products/2").json["priceCents"] == 1500
    assert "JPY 1,500" in admin.get("/admin/products/2").text
    assert fields_of(admin.get("/admin/products/2/edit"))["price"] == "1500"
    buy(7, product_id=2, quantity=2)
    drain()
    assert ",1500,JPY,3000," in admin.get("/admin/orders/orders.csv").text
    assert "JPY 3,000" in admin.get("/admin/orders/").text
    wrong = send(admin, "/admin/products/new", **form | {"price": "15.00"})
    assert (wrong.status_code, 'id="e-price"' in wrong.text) == (422, True)
    gold = send(admin, "/admin/products/new", **form | {"currency": "XAU"})
    assert (gold.status_code, 'id="e-currency"' in gold.text) == (422, True)


def test_another_currency_in_the_form_reads_the_price_anew(client, admin):
    fields = fields_of(admin.get("/admin/products/1/edit"))
    answer = send(admin, "/admin/products/1/edit", **fields | {"currency": "JPY"})
    # 999.99 is no amount in yen; nothing was repriced to JPY 99,999.
    assert (answer.status_code, 'id="e-price"' in answer.text) == (422, True)
    answer = send(
        admin, "/admin/products/1/edit", **fields | {"currency": "JPY", "price": "120,000"}
    )
    assert answer.status_code == 302
    product = client.get("/products/1").json
    assert (product["priceCents"], product["currency"]) == (120_000, "JPY")
    # The same unit: the amount stands.
    fields = fields_of(admin.get("/admin/products/1/edit"))
    assert send(admin, "/admin/products/1/edit", **fields | {"currency": "KRW"}).status_code == 302
    assert client.get("/products/1").json["priceCents"] == 120_000
