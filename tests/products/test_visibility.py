"""Who sees a product and who can buy it: drafts, hidden and archived ones, skus, names as sold."""

import importlib.util
import json
from datetime import UTC, datetime, timedelta

import pytest
from crowd import at_once
from people import fields_of, send
from sqlalchemy import select, text

from app.audit import CLI
from app.books import ledger, recovery
from app.config import ROOT
from app.extensions import db, stock
from app.models import AuditEntry, Product, ProductName
from app.products import sale
from app.products.catalogue import names
from app.stock.keys import KEYS

LAMP = {"name": "Lamp", "priceCents": 1999, "currency": "EUR", "stock": 3}
# Of each state: whether it can be bought, and whether shoppers are shown it.
STATES = {
    "listed": ({}, True, True),
    "hidden": ({"visibility": "hidden"}, True, False),
    "draft": ({"visibility": "draft"}, False, False),
    "archived": ({"archived": True}, False, False),
    "archived draft": ({"visibility": "draft", "archived": True}, False, False),
}


def listed(client, headers=None) -> list[int]:
    return [product["id"] for product in client.get("/products", headers=headers).json]


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("made", ["created so", "changed to it"])
def test_who_sees_it_and_who_can_buy_it(client, buy, admin_headers, state, made):
    terms, sold, shown = STATES[state]
    first = LAMP | terms if made == "created so" else LAMP
    assert client.post("/products", json=first, headers=admin_headers).status_code == 201
    if made == "changed to it":
        client.patch("/products/2", json=terms, headers=admin_headers)
    answer = buy(7, product_id=2)
    assert answer.status_code == (200 if sold else 404)
    if not sold:
        assert answer.json == {"error": "Unknown product", "code": "unknown_product"}
    assert (2 in listed(client)) == shown
    assert client.get("/products/2").status_code == (200 if shown else 404)
    assert listed(client, admin_headers) == [1, 2]
    seen = client.get("/products/2", headers=admin_headers).json
    assert {name: seen[name] for name in terms} == terms
    figures = client.get("/purchase/metrics?productId=2")
    assert figures.status_code == (200 if sold else 404)
    assert client.get("/purchase/metrics").json["stock_remaining"] == 100 + (2 if sold else 0)


def test_a_product_comes_back_from_the_archive_as_it_was(client, buy, admin_headers, drain):
    client.post("/products", json=LAMP, headers=admin_headers)
    assert buy(7, product_id=2, key="before").status_code == 200
    client.patch("/products/2", json={"archived": True}, headers=admin_headers)
    # The order of before stays, and a replay of it is answered as ever.
    assert buy(7, product_id=2, key="before").headers["Idempotent-Replayed"] == "true"
    assert buy(8, product_id=2).status_code == 404
    drain()
    assert client.get("/purchase/orders/7").json[0]["status"] == "CONFIRMED"
    client.patch("/products/2", json={"archived": False}, headers=admin_headers)
    assert buy(8, product_id=2).status_code == 200
    assert client.get("/products/2").json["maxQuantity"] == 10


def test_archiving_amid_a_rush_stops_it_and_the_ledger_holds(
    app, client, buy, admin_headers, drain
):
    client.post("/products", json=LAMP | {"stock": 500}, headers=admin_headers)

    def act(number: int) -> int:
        if number == 50:
            change = {"archived": True}
            return client.patch("/products/2", json=change, headers=admin_headers).status_code
        return buy(number + 1, product_id=2).status_code

    answers = at_once(act, range(100))
    assert set(answers) <= {200, 404}
    assert buy(999, product_id=2).status_code == 404
    drain()
    with app.app_context():
        assert ledger.check().ok
        assert 2 in ledger.check().products


def test_a_rebuild_and_a_restart_leave_it_withdrawn(app, client, buy, admin_headers):
    for terms in ({"visibility": "draft"}, {"archived": True}):
        client.post("/products", json=LAMP | terms, headers=admin_headers)
    with app.app_context():
        recovery.rebuild(CLI)
        sale.publish_stale()
    assert [buy(7, product_id=product).status_code for product in (1, 2, 3)] == [200, 404, 404]


def test_claims_of_an_earlier_version_refuse_it_too(client, admin_headers):
    """Beside new web processes old ones run for a while: they know no drafts."""
    client.post("/products", json=LAMP | {"visibility": "draft"}, headers=admin_headers)
    # Their script refuses a quantity above the maximum.
    assert stock.client.hget(KEYS.product(2), "max") == "0"


def test_a_withdrawn_product_does_not_open(client, admin, admin_headers):
    client.post("/products", json=LAMP | {"visibility": "draft"}, headers=admin_headers)
    answer = send(admin, "/admin/products/2/sale", act="open", confirmed="yes")
    assert answer.status_code == 409
    assert "a draft" in answer.text


def test_a_token_that_is_none_sees_nothing(client):
    answer = client.get("/products", headers={"Authorization": "Bearer fst_wrong"})
    assert answer.status_code == 401
    assert client.get("/products/1", headers={"Authorization": "Bearer x"}).status_code == 401
    # A shopper's own token is no business of this route.
    assert client.get("/products", headers={"Authorization": "Bearer a.b.c"}).status_code == 200


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"visibility": "secret"}, "visibility"), ({"visibility": None}, "visibility"),
        ({"visibility": ["draft"]}, "visibility"), ({"archived": 1}, "archived"),
        ({"archived": None}, "archived"), ({"sku": ""}, "sku"), ({"sku": "a b"}, "sku"),
        ({"sku": "x" * 65}, "sku"), ({"sku": 7}, "sku"), ({"sku": "Ä"}, "sku"),
        ({"currency": "XAU", "priceCents": 1}, "currency"), ({"currency": "XXX"}, "currency"),
        ({"currency": "eur"}, "currency"), ({"currency": "JPY"}, "priceCents"),
    ],
)  # fmt: skip
def test_bad_terms_change_nothing(client, admin_headers, change, field):
    before = client.get("/products/1").json
    answer = client.patch("/products/1", json=change, headers=admin_headers)
    assert (answer.status_code, answer.json["field"]) == (400, field)
    assert client.get("/products/1").json == before


def test_a_sku_is_one_products(client, admin_headers, app):
    first = LAMP | {"sku": "L-1"}
    assert client.post("/products", json=first, headers=admin_headers).json["sku"] == "L-1"
    again = client.post("/products", json=first, headers=admin_headers)
    assert (again.status_code, again.json["code"]) == (409, "sku_taken")
    # Case counts, as in every text of the shop's.
    lower = client.post("/products", json=LAMP | {"sku": "l-1"}, headers=admin_headers)
    assert lower.status_code == 201
    stolen = client.patch("/products/1", json={"sku": "L-1"}, headers=admin_headers)
    assert (stolen.status_code, stolen.json["code"]) == (409, "sku_taken")
    assert client.get("/products/1").json["sku"] is None
    assert client.patch("/products/2", json={"sku": None}, headers=admin_headers).status_code == 200
    assert (
        client.patch("/products/1", json={"sku": "L-1"}, headers=admin_headers).status_code == 200
    )
    with app.app_context():
        assert ledger.check().ok


def test_of_two_at_once_one_gets_the_sku(client, admin_headers):
    body = LAMP | {"sku": "only"}
    answers = at_once(
        lambda _: client.post("/products", json=body, headers=admin_headers).status_code, range(8)
    )
    assert sorted(answers) == [201] + [409] * 7
    assert len(listed(client)) == 2


def test_the_list_is_read_page_by_page(client, admin_headers, app):
    with app.app_context():
        db.session.execute(
            text(
                "INSERT INTO products (name, price_cents, currency, visibility)"
                " SELECT 'P ' || i, 1, 'USD', CASE i % 3 WHEN 0 THEN 'draft' ELSE 'listed' END"
                " FROM generate_series(2, 1600) AS i"
            )
        )
        db.session.commit()
    first = client.get("/products")
    assert len(first.json) == 1000
    assert first.headers["Link"] == f'</products?after={first.json[-1]["id"]}>; rel="next"'
    ids, target = [], "/products?limit=300"
    while target:
        page = client.get(target)
        ids += [product["id"] for product in page.json]
        assert len(page.json) <= 300
        target = page.headers["Link"][1:].partition(">")[0] if "Link" in page.headers else None
    assert ids == sorted(set(ids))
    assert len(ids) == 1 + 1599 - 533
    assert all(product_id % 3 for product_id in ids)
    assert "Link" not in client.get("/products?after=9007199254740991").headers
    for wrong in ("limit=0", "limit=1001", "limit=x", "limit=", "after=-1", "after=1.5"):
        answer = client.get(f"/products?{wrong}")
        assert (answer.status_code, answer.json["code"]) == (400, "invalid_request"), wrong


def test_the_currency_is_fixed_once_something_was_sold(client, buy, admin_headers, drain):
    change = {"currency": "JPY", "priceCents": 1500}
    assert client.patch("/products/1", json=change, headers=admin_headers).status_code == 200
    assert client.get("/products/1").json["currencyDigits"] == 0
    assert buy(7).json["unitPriceCents"] == 1500
    for _ in ("while it waits", "when it is stored"):
        answer = client.patch("/products/1", json={"currency": "USD"}, headers=admin_headers)
        assert (answer.status_code, answer.json["code"]) == (409, "currency_fixed")
        drain()
    # The same one is no change.
    assert client.patch("/products/1", json=change, headers=admin_headers).status_code == 200


def test_an_order_keeps_the_name_as_sold(app, client, admin, buy, admin_headers, drain):
    assert buy(7).status_code == 200
    for name in ("Second name", "Third name"):
        client.patch("/products/1", json={"name": name}, headers=admin_headers)
        assert buy(8).status_code == 200
    drain()
    sheet = admin.get("/admin/orders/orders.csv").text.splitlines()
    assert [line.split(",")[4] for line in sheet[1:]] == [
        "Third name", "Second name", "Flash-sale item",
    ]  # fmt: skip
    for order, name in ((1, "Flash-sale item"), (2, "Second name"), (3, "Third name")):
        assert name in admin.get(f"/admin/orders/{order}").text
    page = admin.get("/admin/orders/").text
    assert "Flash-sale item" in page
    with app.app_context():
        assert names()[1] == "Third name"
        assert names().sold(99, datetime.now(UTC)) is None
        assert len(list(db.session.scalars(select(ProductName)))) == 2


def test_names_of_before_are_taken_from_the_audit(app, client, admin_headers):
    """The migration's own statement, on what a system of before has: entries, and no names."""
    path = ROOT / "migrations/versions/0010_shop.py"
    spec = importlib.util.spec_from_file_location("shop_migration", path)
    migration = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(migration)
    client.patch("/products/1", json={"name": "New"}, headers=admin_headers)
    client.patch("/products/1", json={"paused": True}, headers=admin_headers)
    with app.app_context():
        db.session.execute(text("TRUNCATE product_names"))
        db.session.execute(text(migration.NAMES_IN_THE_AUDIT))
        (kept,) = db.session.scalars(select(ProductName))
        changed_at = db.session.scalar(
            select(AuditEntry.at)
            .where(AuditEntry.action == "product.change")
            .order_by(AuditEntry.id.desc())
            .offset(1)
            .limit(1)
        )
        assert (kept.name, kept.until) == ("Flash-sale item", changed_at)
        assert names().sold(1, changed_at - timedelta(seconds=1)) == "Flash-sale item"
        assert names().sold(1, changed_at + timedelta(seconds=1)) == "New"


def test_archived_products_leave_the_pages_and_stay_in_the_ledger(
    app, client, admin, admin_headers
):
    client.post("/products", json=LAMP, headers=admin_headers)
    client.patch("/products/2", json={"archived": True}, headers=admin_headers)
    assert "Lamp" not in admin.get("/admin/").text
    assert "Lamp" not in admin.get("/admin/products/").text
    assert "Lamp" in admin.get("/admin/products/?state=archived").text
    page = admin.get("/admin/products/2").text
    assert "Archived" in page
    assert "Restore" in page
    with app.app_context():
        ledger.keep_proof()
    assert "Lamp" in admin.get("/admin/ledger/").text


def test_archive_and_restore_by_the_page(client, admin, admin_headers):
    client.post("/products", json=LAMP, headers=admin_headers)
    asked = send(admin, "/admin/products/2/sale", act="archive")
    assert "Archive this product?" in asked.text
    assert client.get("/products/2").status_code == 200
    send(admin, "/admin/products/2/sale", act="archive", confirmed="yes")
    assert client.get("/products/2").status_code == 404
    asked = send(admin, "/admin/products/2/sale", act="restore")
    assert "Restore this product?" in asked.text
    send(admin, "/admin/products/2/sale", act="restore", confirmed="yes")
    assert client.get("/products/2").status_code == 200


def test_a_form_of_an_earlier_version_leaves_what_it_does_not_know(app, client, admin):
    with app.app_context():
        db.session.execute(
            text("UPDATE products SET sku = 'S', visibility = 'hidden', version = version + 1")
        )
        db.session.commit()
    fields = fields_of(admin.get("/admin/products/1/edit"))
    for name in ("sku", "visibility"):
        del fields[name]
    was = json.loads(fields["was"])
    fields["was"] = json.dumps({k: v for k, v in was.items() if k in fields})
    assert send(admin, "/admin/products/1/edit", **fields | {"name": "Renamed"}).status_code == 302
    with app.app_context():
        product = db.session.get(Product, 1)
        assert (product.name, product.sku, product.visibility) == ("Renamed", "S", "hidden")
