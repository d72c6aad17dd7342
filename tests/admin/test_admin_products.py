"""The product pages: terms, acts that bind the next purchase, restocks, the ledger."""

import json
import re
from datetime import UTC, datetime, timedelta

import pytest
from crowd import at_once
from people import BROWSER, csrf_token, fields_of, scripted, send
from waiting import wait_until

from app.extensions import db, stock
from app.models import AuditEntry, Product
from app.problems import Unavailable

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
        ("currency", "Euros", "The currency must be a code of ISO 4217"),
        ("stock", "-1", "The stock must be"),
        ("stock", "99999999", "The stock must be from 0 to"),
        ("max_quantity", "0", "The maximum must be from 1"),
        ("per_user", "many", "The cap must be a whole number"),
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


def edit(admin, product_id: int, **typed):
    """Open the form as a browser without a script does, type, and send it."""
    path = f"/admin/products/{product_id}/edit"
    return send(admin, path, **fields_of(admin.get(path)) | typed)


def test_window_without_a_script_is_utc(client, admin):
    send(admin, "/admin/products/new", **TERMS | {"opens": "2030-06-01T09:00"})
    product = client.get("/products/2").json
    assert (product["opensAt"], product["closesAt"]) == ("2030-06-01T09:00:00.000Z", None)
    page = admin.get("/admin/products/2/edit")
    assert fields_of(page)["opens"] == "2030-06-01T09:00:00"
    assert "In <span data-zone>UTC</span>" in page.text
    answer = edit(admin, 2, closes="2030-06-01T08:00")
    assert answer.status_code == 422
    assert "The closing must be after the opening" in answer.text
    assert fields_of(answer)["closes"] == "2030-06-01T08:00:00"
    edit(admin, 2, opens="", closes="2030-06-01T08:00")
    product = client.get("/products/2").json
    assert (product["opensAt"], product["closesAt"]) == (None, "2030-06-01T08:00:00.000Z")


def test_window_with_a_script_is_the_instant_that_was_sent(client, admin):
    form = fields_of(admin.get("/admin/products/new", follow_redirects=True)) | TERMS
    sent = scripted(form, opens="2030-06-01T07:00:00.000Z", closes="2030-06-01T10:30:15.250Z")
    send(admin, "/admin/products/new", **sent)
    product = client.get("/products/2").json
    assert product["opensAt"] == "2030-06-01T07:00:00.000Z"
    assert product["closesAt"] == "2030-06-01T10:30:15.250Z"
    # A form that is shown again still means the same instant.
    sent = fields_of(admin.get("/admin/products/2/edit")) | {"price": "x"}
    again = send(admin, "/admin/products/2/edit", **sent)
    assert again.status_code == 422
    assert fields_of(again)["opens_at"] == sent["opens_at"]


def test_a_page_of_the_version_before_sends_wall_time_and_offset(client, admin):
    terms = TERMS | {"opens": "2030-06-01T09:00", "opens_offset": "+02:00"}
    send(admin, "/admin/products/new", **terms)
    assert client.get("/products/2").json["opensAt"] == "2030-06-01T07:00:00.000Z"


def test_untouched_is_unchanged_to_the_microsecond(app, client, admin, admin_headers):
    opened = "2026-11-01T10:20:30.123456+00:00"
    closing = "2031-11-01T10:20:30.654321+00:00"
    client.patch(
        "/products/1", json={"opensAt": opened, "closesAt": closing}, headers=admin_headers
    )
    form = fields_of(admin.get("/admin/products/1/edit")) | {"price": "5.00"}
    assert send(admin, "/admin/products/1/edit", **form).status_code == 302
    with app.app_context():
        product = db.session.get(Product, 1)
        assert product.price_cents == 500
        assert product.opens_at.isoformat() == opened
        assert product.closes_at.isoformat() == closing
        entry = db.session.query(AuditEntry).order_by(AuditEntry.id.desc()).first()
        assert entry.after == {"priceCents": 500}


def test_a_form_left_open_never_closes_a_sale_that_was_opened_meanwhile(
    client, admin, admin_headers, buy
):
    later = (datetime.now(UTC) + timedelta(days=1)).isoformat()
    client.patch("/products/1", json={"opensAt": later}, headers=admin_headers)
    forgotten = fields_of(admin.get("/admin/products/1/edit"))
    act(admin, "open", confirmed="yes")
    opened = client.get("/products/1").json
    answer = send(admin, "/admin/products/1/edit", **forgotten | {"price": "5"})
    assert answer.status_code == 409
    assert buy(1).status_code == 200
    assert client.get("/products/1").json["priceCents"] == opened["priceCents"]
    # Both are shown, and what was typed is kept; what was left alone is what it is now.
    shown = fields_of(answer)
    assert shown["price"] == "5"
    assert shown["opens_at"][:23] == opened["opensAt"][:23]
    assert answer.text.count("<td") == 4
    for text in (later[:19].replace("T", " "), shown["opens"].replace("T", " ")):
        assert f"{text} UTC</time>" in answer.text
    assert send(admin, "/admin/products/1/edit", **shown).status_code == 302
    assert buy(2).status_code == 200
    assert client.get("/products/1").json == opened | {"priceCents": 500, "stockRemaining": 98}


def test_a_stale_form_shows_who_changed_what(client, admin, admin_headers):
    stale = fields_of(admin.get("/admin/products/1/edit"))
    client.patch(
        "/products/1", json={"name": "Theirs", "priceCents": 700, "maxQuantity": 3},
        headers=admin_headers,
    )  # fmt: skip
    answer = send(admin, "/admin/products/1/edit", **stale | {"name": "Mine", "price": "x"})
    assert answer.status_code == 422
    answer = send(
        admin, "/admin/products/1/edit", **fields_of(answer) | {"price": "999.99", "per_user": "4"}
    )
    assert answer.status_code == 409
    rows = [re.sub("<[^>]+>|\n", "|", row) for row in answer.text.split("<tr>")[2:]]
    seen = [[cell for cell in row.split("|") if cell.strip()] for row in rows]
    assert [row[:4] for row in seen] == [
        ["Name", "Flash-sale item", "Theirs", "Mine"],
        ["Price", "999.99", "7.00", "–"],
        ["Most per purchase", "10", "3", "–"],
    ]
    shown = fields_of(answer)
    assert (shown["name"], shown["price"], shown["per_user"]) == ("Mine", "7.00", "4")
    assert client.get("/products/1").json["name"] == "Theirs"
    assert send(admin, "/admin/products/1/edit", **shown).status_code == 302
    product = client.get("/products/1").json
    assert (product["name"], product["priceCents"], product["perUserLimit"]) == ("Mine", 700, 4)


def test_saving_twice_is_saving_once(app, client, admin):
    form = fields_of(admin.get("/admin/products/1/edit")) | {"price": "5"}
    for _ in range(2):
        assert send(admin, "/admin/products/1/edit", **form).status_code == 302
    with app.app_context():
        assert db.session.get(Product, 1).version == 2


@pytest.mark.parametrize("lost", [{"version": ""}, {"version": "x"}, {"was": "{"}, {"was": "[]"}])
def test_a_form_that_does_not_say_what_it_showed_is_stale(client, admin, lost):
    form = fields_of(admin.get("/admin/products/1/edit")) | {"name": "Mine"} | lost
    answer = send(admin, "/admin/products/1/edit", **form)
    assert answer.status_code == 409
    assert client.get("/products/1").json["name"] == "Flash-sale item"
    assert "Mine" in answer.text
    send(admin, "/admin/products/1/edit", **fields_of(answer))
    assert client.get("/products/1").json["name"] == "Mine"


def test_a_form_creates_once(client, admin):
    address = admin.get("/admin/products/new").location
    form = fields_of(admin.get(address)) | TERMS
    # Pressed twice at once, again after the answer, and after going back.
    token = csrf_token(admin)
    answers = at_once(
        lambda _: _copy(admin).post(address, data=form | {"csrf_token": token}), range(4)
    )
    again = fields_of(admin.get(address)) | TERMS
    answers.append(admin.post(address, data=again))
    assert {answer.status_code for answer in answers} == {302}
    assert {answer.location for answer in answers} == {"/admin/products/2"}
    assert "created already; nothing was created twice" in admin.get("/admin/products/2").text
    assert len(client.get("/products").json) == 2
    # With other terms it asks, once.
    answer = admin.post(address, data=again | {"name": "Other"})
    assert answer.status_code == 422
    assert "has created a product already" in answer.text
    assert len(client.get("/products").json) == 2
    assert admin.post(address, data=fields_of(answer) | {"stock": "5"}).status_code == 302
    assert [product["name"] for product in client.get("/products").json][1:] == ["Lamp", "Other"]
    # Another form is another product.
    assert admin.get("/admin/products/new").location != address


def _copy(browser):
    """The same person's browser in another thread."""
    copy = browser.application.test_client()
    cookie = next(iter(browser._cookies.values()))
    copy.set_cookie(cookie.key, cookie.value)
    return copy


def test_created_without_an_answer_is_finished_by_the_same_form(client, admin, monkeypatch):
    address = admin.get("/admin/products/new").location
    form = fields_of(admin.get(address)) | TERMS
    with monkeypatch.context() as patch:
        patch.setattr(stock, "put_new", refuse)
        answer = admin.post(address, data=form)
    assert answer.status_code == 503
    assert "this form" not in answer.text
    assert "creates the product once only" in answer.text
    assert fields_of(answer)["name"] == "Lamp"
    assert admin.post(address, data=fields_of(answer)).status_code == 302
    assert client.get("/products/2").json["stockRemaining"] == 1000
    assert len(client.get("/products").json) == 2


def test_a_change_that_redis_did_not_hear_of_keeps_what_was_typed(client, admin, monkeypatch):
    form = fields_of(admin.get("/admin/products/1/edit")) | {"name": "Typed"}
    with monkeypatch.context() as patch:
        patch.setattr(stock, "put_product", refuse)
        answer = send(admin, "/admin/products/1/edit", **form)
    assert answer.status_code == 503
    assert "Redis did not answer" in answer.text
    assert fields_of(answer)["name"] == "Typed"
    assert send(admin, "/admin/products/1/edit", **fields_of(answer)).status_code == 302
    assert client.get("/products/1").json["name"] == "Typed"


def refuse(*arguments):
    raise Unavailable("gone")


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
    act(admin, "open", confirmed="yes")
    assert buy(1).status_code == 200


def test_open_now_before_the_window(client, admin, admin_headers, buy):
    later = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
    client.patch("/products/1", json={"opensAt": later}, headers=admin_headers)
    assert buy(1).json["code"] == "not_open"
    assert "opens in 59 min" in admin.get("/admin/products/1").text
    answer = act(admin, "open")
    assert "Open this sale now?" in answer.text
    assert f"It was to open at {later[:19].replace('T', ' ')} UTC" in answer.text
    assert buy(1).json["code"] == "not_open"
    act(admin, "open", confirmed="yes")
    assert buy(1).status_code == 200


def test_reopened_it_closes_as_planned(client, admin, admin_headers, buy):
    closing = (datetime.now(UTC) + timedelta(hours=3)).isoformat()
    client.patch("/products/1", json={"closesAt": closing}, headers=admin_headers)
    planned = client.get("/products/1").json
    act(admin, "end", confirmed="yes")
    act(admin, "end", confirmed="yes")
    assert buy(1).json["code"] == "ended"
    answer = act(admin, "open")
    assert answer.status_code == 302
    told = f"it closes at {closing[:19].replace('T', ' ')} UTC"
    assert told in admin.get("/admin/products/1").text
    assert client.get("/products/1").json == planned
    assert buy(1).status_code == 200


def test_a_scheduled_sale_can_be_paused_and_ended_and_is_scheduled_again(
    client, admin, admin_headers, buy
):
    opening = (datetime.now(UTC) + timedelta(hours=3)).isoformat()
    client.patch("/products/1", json={"opensAt": opening}, headers=admin_headers)
    planned = client.get("/products/1").json
    page = admin.get("/admin/products/1").text
    assert 'name="act" value="pause"' in page
    assert 'name="act" value="end"' in page
    act(admin, "pause")
    assert buy(1).json["code"] == "paused"
    act(admin, "resume")
    assert buy(1).json["code"] == "not_open"
    act(admin, "end", confirmed="yes")
    assert buy(1).json["code"] == "ended"
    assert "no later end is planned" in act(admin, "open").text
    act(admin, "open", confirmed="yes")
    assert client.get("/products/1").json == planned
    assert buy(1).json["code"] == "not_open"
    assert "is scheduled again" in admin.get("/admin/products/1").text


@pytest.mark.parametrize("planned", [None, timedelta(seconds=-1), timedelta(seconds=1)])
def test_reopening_without_a_planned_end_asks(app, client, admin, admin_headers, buy, planned):
    """None was planned; or its time has come, by itself or while the sale was ended."""
    if planned:
        closing = (datetime.now(UTC) + planned).isoformat()
        client.patch("/products/1", json={"closesAt": closing}, headers=admin_headers)
    act(admin, "end", confirmed="yes")
    if planned:
        wait_until(lambda: datetime.now(UTC) > datetime.fromisoformat(closing), 5)
    assert "Reopen this sale without an end?" in act(admin, "open").text
    assert buy(1).json["code"] == "ended"
    act(admin, "open", confirmed="yes")
    assert client.get("/products/1").json["closesAt"] is None
    assert buy(1).status_code == 200


def test_an_end_that_was_planned_anew_is_the_one_that_counts(client, admin, admin_headers):
    now = datetime.now(UTC)
    for hours in (3, None):
        closing = hours and (now + timedelta(hours=hours)).isoformat()
        client.patch("/products/1", json={"closesAt": closing}, headers=admin_headers)
        if hours:
            act(admin, "end", confirmed="yes")
    act(admin, "end", confirmed="yes")
    assert "Reopen this sale without an end?" in act(admin, "open").text


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


def test_a_form_that_has_restocked_tells_so_before_it_adds_something_else(client, admin):
    restock(admin, "50", reason="truck")
    for amount, reason in (("50", "another truck"), ("51", "truck")):
        answer = restock(admin, amount, BROWSER, reason=reason, key="test-50")
        assert "This form has added units before, with something else in it" in answer.text
        assert f'value="{reason}"' in answer.text
        assert client.get("/products/1").json["stockRemaining"] == 150
    # Whoever has read it goes on with the form of this answer, which has another key.
    key = re.search(r'name="key" value="([^"]+)"', answer.text)[1]
    restock(admin, "51", BROWSER, reason="truck", key=key)
    assert client.get("/products/1").json["stockRemaining"] == 201


def test_restock_form_is_a_fragment_and_a_page(admin):
    assert "<html" in admin.get("/admin/products/1/restock").text
    fragment = admin.get("/admin/products/1/restock", headers=BROWSER).text
    assert "<html" not in fragment
    # Each form has a key of its own.
    again = admin.get("/admin/products/1/restock", headers=BROWSER).text
    assert 'name="key" value="form-' in fragment
    assert fragment != again


@pytest.mark.parametrize(
    "amount", ["", "0", "-5", "ten", "1.5", "2,5", "2.000", "1000001", "9" * 30]
)
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
