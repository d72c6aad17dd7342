"""The product pages: terms, acts that bind the next purchase, restocks, the ledger."""

import json
from datetime import UTC, datetime, timedelta

import pytest
from people import BROWSER, csrf_token, send

TERMS = {
    "name": "Lamp", "price": "19.90", "currency": "usd", "stock": "1,000", "max_quantity": "5",
    "per_user": "", "opens": "", "closes": "",
}  # fmt: skip


def test_pages_include_their_fragments(admin):
    for page, fragment in (
        ("/admin/products/", "/admin/products/live"),
        ("/admin/products/1", "/admin/products/1/live"),
        ("/admin/", "/admin/live"),
        ("/admin/ledger/", "/admin/ledger/live"),
    ):
        assert "<html" in admin.get(page).text
        answer = admin.get(fragment, headers=BROWSER)
        assert answer.status_code == 200
        assert "<html" not in answer.text


def test_create(client, admin, buy):
    answer = send(admin, "/admin/products/new", **TERMS)
    assert (answer.status_code, answer.location) == (302, "/admin/products/2")
    product = client.get("/products/2").json
    assert (product["name"], product["priceCents"], product["stockRemaining"]) == (
        "Lamp", 1990, 1000,
    )  # fmt: skip
    assert "Lamp is created with 1,000 units." in admin.get("/admin/products/2").text
    assert buy(7, product_id=2).status_code == 200


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("name", "", "The name must be"),
        ("price", "cheap", "must be an amount like 999.99"),
        ("price", "1.999", "must be an amount like 999.99"),
        ("currency", "Euros", "The currency must be three capital letters"),
        ("stock", "-1", "The stock must be"),
        ("stock", "99999999", "The stock must be from 0 to"),
        ("max_quantity", "0", "The maximum must be from 1"),
        ("per_user", "many", "The cap must be an integer"),
        ("opens", "tomorrow", "not a date and time"),
    ],
)
def test_errors_stand_beside_their_field(client, admin, field, value, message):
    answer = send(admin, "/admin/products/new", **TERMS | {field: value})
    assert answer.status_code == 422
    assert message in answer.text
    assert f'id="e-{field}"' in answer.text
    assert "Lamp" in answer.text or field == "name"
    assert len(client.get("/products").json) == 1


def test_window_in_the_browsers_zone(client, admin):
    terms = TERMS | {
        "opens": "2030-06-01T09:00", "opens_offset": "+02:00",
        "closes": "2030-06-01T12:30:15", "closes_offset": "+02:00",
    }  # fmt: skip
    send(admin, "/admin/products/new", **terms)
    product = client.get("/products/2").json
    assert product["opensAt"] == "2030-06-01T07:00:00.000Z"
    assert product["closesAt"] == "2030-06-01T10:30:15.000Z"
    # Without the script the form speaks UTC.
    send(admin, "/admin/products/2/edit", **TERMS | {"opens": "2030-06-01T09:00"})
    product = client.get("/products/2").json
    assert (product["opensAt"], product["closesAt"]) == ("2030-06-01T09:00:00.000Z", None)
    answer = send(
        admin, "/admin/products/2/edit",
        **TERMS | {"opens": "2030-06-01T09:00", "closes": "2030-06-01T08:00"},
    )  # fmt: skip
    assert answer.status_code == 422
    assert "The closing must be after the opening" in answer.text


def test_edit_leaves_unchanged_times_alone(client, admin, admin_headers):
    opened = (datetime.now(UTC) - timedelta(hours=1)).isoformat()
    client.patch("/products/1", json={"opensAt": opened}, headers=admin_headers)
    before = client.get("/products/1").json["opensAt"]
    send(
        admin, "/admin/products/1/edit",
        **TERMS | {"name": "Renamed", "opens": before[:19], "opens_offset": "+00:00"},
    )  # fmt: skip
    after = client.get("/products/1").json
    assert (after["name"], after["opensAt"]) == ("Renamed", before)


def note_of(answer) -> str:
    return json.loads(answer.headers["HX-Trigger"])["note"]["text"]


def act(admin, name: str, **more):
    return send(admin, "/admin/products/1/sale", act=name, **more)


def test_each_act_binds_the_very_next_purchase(admin, buy):
    act(admin, "pause")
    assert buy(1).json["code"] == "paused"
    act(admin, "resume")
    assert buy(1).status_code == 200
    act(admin, "end", confirmed="yes")
    assert buy(1).json["code"] == "ended"
    act(admin, "open")
    assert buy(1).status_code == 200


def test_open_now_before_the_window(client, admin, admin_headers, buy):
    later = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
    client.patch("/products/1", json={"opensAt": later}, headers=admin_headers)
    assert buy(1).json["code"] == "not_open"
    assert "opens in 59 min" in admin.get("/admin/products/1").text
    act(admin, "open")
    assert buy(1).status_code == 200


def test_ending_asks_first(admin, buy):
    answer = act(admin, "end")
    assert answer.status_code == 200
    assert "End this sale now?" in answer.text
    assert buy(1).status_code == 200


def test_an_act_answers_htmx_with_the_row_and_a_note(admin):
    answer = send(admin, "/admin/products/1/sale", BROWSER, act="pause", view="row")
    assert "<html" not in answer.text
    assert 'id="product-1"' in answer.text
    assert "Paused" in answer.text
    assert note_of(answer) == "Flash-sale item is paused."


def test_unknown_act_and_product(admin):
    assert act(admin, "explode").status_code == 400
    assert admin.get("/admin/products/99").status_code == 404
    token = csrf_token(admin)
    data = {"act": "pause", "csrf_token": token}
    assert admin.post("/admin/products/99/sale", data=data).status_code == 404


def restock(admin, amount: str, headers=None, **more):
    data = {"key": f"test-{amount}", "amount": amount, "reason": ""} | more
    return send(admin, "/admin/products/1/restock", headers, **data)


def test_restock_shows_the_new_stock(client, admin):
    answer = restock(admin, "50", BROWSER, reason="found a box")
    assert "<b data-free>150</b>" in answer.text
    assert note_of(answer) == "50 units added: 150 are free now."
    page = admin.get("/admin/products/1").text
    assert "found a box" in page
    assert "staff admin-page@example.com" in page
    assert "+50" in page


def test_the_same_form_restocks_once(client, admin):
    restock(admin, "50")
    answer = restock(admin, "50", BROWSER)
    assert "nothing was added twice" in note_of(answer)
    assert client.get("/products/1").json["stockRemaining"] == 150


def test_restock_form_is_a_fragment_and_a_page(admin):
    assert "<html" in admin.get("/admin/products/1/restock").text
    fragment = admin.get("/admin/products/1/restock", headers=BROWSER).text
    assert "<html" not in fragment
    # Each form has a key of its own.
    again = admin.get("/admin/products/1/restock", headers=BROWSER).text
    assert 'name="key" value="form-' in fragment
    assert fragment != again


@pytest.mark.parametrize("amount", ["", "0", "-5", "ten", "1.5", "1000001", "9" * 30])
def test_wrong_amounts_stand_beside_their_field(client, admin, amount):
    answer = restock(admin, amount, BROWSER)
    assert answer.status_code == 422
    assert answer.headers["HX-Retarget"] == "#restock-form-1"
    assert "The amount must be" in answer.text
    # Without htmx: a page with the same form.
    answer = restock(admin, amount)
    assert answer.status_code == 422
    assert "<html" in answer.text
    assert client.get("/products/1").json["stockRemaining"] == 100


def test_ledger_is_paged(client, admin, admin_headers):
    for amount in range(1, 31):
        client.post(
            "/products/restock", json={"productId": 1, "amount": amount}, headers=admin_headers
        )
    page = admin.get("/admin/products/1").text
    assert "+30" in page
    assert "Initial" not in page
    older = admin.get("/admin/products/1?before=7").text
    assert "Initial" in older
    assert "+30" not in older
