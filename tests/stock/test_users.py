"""Shoppers by the shop's own names, prices that were shown, references: at every edge and in every
table."""

import csv
import io
import re
from urllib.parse import quote

import pytest
from sqlalchemy import text

from app.audit import CLI
from app.books import ledger, recovery
from app.extensions import db
from app.models import Order
from app.orders import cancelling, deadletters
from app.problems import InvalidRequest
from app.reading import MAX_ID, read_price, read_reference, read_user

# What is sent, and who that is: no two of them are the same shopper, but for those of equal form.
SHOPPERS = [
    (42, 42), ("42", 42), (1, 1), (MAX_ID, MAX_ID), (str(MAX_ID), MAX_ID),
    ("042", "042"), ("0", "0"), ("00", "00"), (str(MAX_ID + 1), str(MAX_ID + 1)),
    ("-1", "-1"), ("+1", "+1"), ("1.0", "1.0"), ("1e3", "1e3"),
    ("3f2504e0-4f89-11d3-9a0c-0305e82c3301", "3f2504e0-4f89-11d3-9a0c-0305e82c3301"),
    ("auth0|42", "auth0|42"), ("ann+shop@example.org", "ann+shop@example.org"),
    ("ann", "ann"), ("Ann", "Ann"), ("a:b", "a:b"), ("a", "a"), ("...", "..."), ("~", "~"),
    ("v2", "v2"), ("x" * 64, "x" * 64),
]  # fmt: skip
NOBODY = [
    "", " ", "a b", " a", "a ", "a\n", "a\0", "a/b", "a%41", "ü", "９", '"', "'", "<b>", "a,b",
    ".", "..", "x" * 65, True, False, None, 1.0, 1.5, [], [1], {}, {"id": 1},
]  # fmt: skip


@pytest.mark.parametrize(("sent", "user"), SHOPPERS)
def test_a_shopper_has_one_form(sent, user):
    read = read_user({"userId": sent})
    assert (read, type(read)) == (user, type(user))


@pytest.mark.parametrize("sent", NOBODY)
def test_what_is_nobodys_name(sent):
    with pytest.raises(InvalidRequest) as error:
        read_user({"userId": sent})
    assert error.value.field == "userId"
    assert "integer or a text of 1 to 64 characters" in str(error.value)


def test_numbers_out_of_range_and_nothing_at_all():
    for number in (0, -1, MAX_ID + 1):
        with pytest.raises(InvalidRequest, match="must be from 1 to 9007199254740991"):
            read_user({"userId": number})
    with pytest.raises(InvalidRequest, match="userId is required"):
        read_user({})


def test_references_and_prices():
    assert read_reference({}) is read_reference({"reference": None}) is None
    assert read_reference({"reference": "cart:4711/#"}) == "cart:4711/#"
    for wrong in ("", "a b", "x" * 65, "ü", 1, True, [], "\n"):
        with pytest.raises(InvalidRequest, match="reference must be"):
            read_reference({"reference": wrong})
    assert read_price({}) is read_price({"expectedPriceCents": None}) is None
    assert read_price({"expectedPriceCents": 0}) == 0
    for wrong in (-1, "1", 1.0, True, MAX_ID + 1, []):
        with pytest.raises(InvalidRequest, match="expectedPriceCents must be"):
            read_price({"expectedPriceCents": wrong})


def path_of(user):
    return "/purchase/orders/" + quote(str(user), safe="")


def purchase(client, user, key=None, **more):
    headers = {"Idempotency-Key": key} if key else {}
    return client.post("/purchase", json={"userId": user, "productId": 1} | more, headers=headers)


def cap(client, admin_headers, units):
    client.patch("/products/1", json={"perUserLimit": units}, headers=admin_headers)


def ids(answer):
    assert answer.status_code == 200, answer.text
    return [order["id"] for order in answer.json]


def test_each_shopper_has_a_cap_a_list_and_keys_of_ones_own(app, client, admin_headers, drain):
    cap(client, admin_headers, 1)
    orders = {}
    for sent, user in SHOPPERS:
        answer = purchase(client, sent, key="same", reference=str(user))
        if user in orders:
            assert answer.headers["Idempotent-Replayed"] == "true"
            assert answer.json["orderId"] == orders[user]
            assert purchase(client, sent).json["code"] == "purchase_limit"
        else:
            assert answer.status_code == 200, (sent, answer.text)
            orders[user] = answer.json["orderId"]

    def listed_alone():
        for sent, user in SHOPPERS:
            assert ids(client.get(path_of(sent))) == [orders[user]]

    listed_alone()
    assert {order["status"] for order in client.get(path_of("auth0|42")).json} == {"QUEUED"}
    assert drain() == len(orders)
    listed_alone()
    with app.app_context():
        stored = {order.user: order.id for order in db.session.query(Order)}
        assert stored == orders
        assert ledger.check(rows=True).ok
        # What a lost Redis knew of caps is all in PostgreSQL.
        recovery.rebuild(CLI)
    for _, user in SHOPPERS:
        assert purchase(client, user).json["code"] == "purchase_limit", user


def test_the_parts_of_a_key_do_not_mix(client):
    """User "a:b" with key "c" is not user "a" with key "b:c"."""
    first, second, third = (
        purchase(client, user, key=key) for user, key in (("a:b", "c"), ("a", "b:c"), (1, "2:c"))
    )
    fourth = purchase(client, "1:2", key="c")
    assert len({answer.json["orderId"] for answer in (first, second, third, fourth)}) == 4


def test_a_path_that_names_nobody(client):
    for wrong in ("a b", "ü", "x" * 65, "a%b", "."):
        answer = client.get(path_of(wrong))
        assert (answer.status_code, answer.json["field"]) == (400, "userId"), wrong


def test_a_plus_in_a_path_is_a_plus(client):
    purchase(client, "a+b")
    assert ids(client.get("/purchase/orders/a+b")) == ids(client.get("/purchase/orders/a%2Bb"))
    assert len(ids(client.get("/purchase/orders/a+b"))) == 1


def test_the_price_is_told_and_may_be_expected(client, drain, admin_headers):
    first = purchase(client, "ann", expectedPriceCents=99_999, reference="cart#1", key="k")
    assert first.json == {
        "status": "queued", "orderId": 1, "unitPriceCents": 99_999, "currency": "USD",
    }  # fmt: skip
    assert list(first.json)[:2] == ["status", "orderId"]
    client.patch("/products/1", json={"priceCents": 5}, headers=admin_headers)
    refused = purchase(client, "ann", expectedPriceCents=99_999)
    assert refused.status_code == 409
    assert refused.json["code"] == "price_changed"
    assert (refused.json["priceCents"], refused.json["currency"]) == (5, "USD")
    assert purchase(client, "ann", expectedPriceCents=5).status_code == 200
    for _ in range(2):
        second, order = client.get(path_of("ann")).json
        assert list(order)[:5] == ["id", "status", "quantity", "productId", "createdAt"]
        told = (order["unitPriceCents"], order["currency"], order["reference"])
        assert told == (99_999, "USD", "cart#1")
        assert second["unitPriceCents"] == 5
        assert "reference" not in second
        drain()
    # A key's fingerprint has the reference, and not the price that was expected.
    assert purchase(client, "ann", key="k", reference="cart#2").status_code == 422
    assert (
        purchase(client, "ann", key="k", reference="cart#1", expectedPriceCents=1).json["orderId"]
        == 1
    )


def test_a_cancelled_order_gives_its_shopper_the_cap_back(app, client, drain, admin_headers):
    cap(client, admin_headers, 1)
    purchase(client, "auth0|42")
    purchase(client, "Auth0|42")
    drain()
    assert purchase(client, "auth0|42").status_code == 409
    with app.app_context():
        cancelling.cancel(1, "returned", CLI)
    assert purchase(client, "Auth0|42").status_code == 409
    assert purchase(client, "auth0|42").status_code == 200
    drain()
    with app.app_context():
        recovery.rebuild(CLI)
    assert purchase(client, "auth0|42").status_code == 409


def test_the_replay_of_an_ended_order_says_so(app, client, drain):
    """And sells nothing anew; the same after a rebuild. Another shopper's key is no matter."""
    for user in ("ann", 7):
        order = purchase(client, user, key="k", reference="cart-1").json["orderId"]
        drain()
        with app.app_context():
            cancelling.cancel(order, "returned", CLI)
        for _ in range(2):
            again = purchase(client, user, key="k", reference="cart-1")
            assert again.status_code == 409
            assert again.json == {
                "error": "Order ended", "code": "order_ended", "orderId": order,
                "orderStatus": "CANCELLED",
            }  # fmt: skip
            assert again.headers["Idempotent-Replayed"] == "true"
            assert purchase(client, user, key="k", reference="cart-2").status_code == 422
            with app.app_context():
                recovery.rebuild(CLI)
        assert ids(client.get(path_of(user))) == [order]
    assert purchase(client, "Ann", key="k").status_code == 200


def test_dead_letters_of_texts(app, client, drain, admin_headers, admin):
    cap(client, admin_headers, 1)
    with app.app_context():
        db.session.execute(
            text("ALTER TABLE orders ADD CONSTRAINT odd CHECK (quantity < 0) NOT VALID")
        )
        db.session.commit()
    for user in ("ann", "bob"):
        purchase(client, user, key="k", reference=f"cart-{user}")
    assert drain() == 0
    assert [order["status"] for order in client.get(path_of("ann")).json] == ["FAILED"]
    assert "cart-" not in client.get(path_of("cat")).text
    with app.app_context():
        db.session.execute(text("ALTER TABLE orders DROP CONSTRAINT odd"))
        db.session.commit()
        (letter,) = deadletters.list_letters(deadletters.Filters(user="ann"))
        assert (letter.user, letter.user_id, letter.reference) == ("ann", None, "cart-ann")
        assert deadletters.list_letters(deadletters.Filters(user="Ann")) == []
        (other,) = deadletters.list_letters(deadletters.Filters(user="bob"))
        replayed, other_id = letter.id, other.id
    listed = admin.get("/admin/dead-letters/?user=ann").text
    assert "ann" in listed
    assert "bob" not in listed
    assert "bob" not in admin.get("/admin/dead-letters/?user=a b").text
    found = admin.get("/admin/orders/?q=cart-bob").text
    assert re.findall(r'href="/admin/orders/(\d+)"', found) == ["2"]
    with app.app_context():
        (done,) = deadletters.replay([replayed], "mended", CLI)
        assert done.done, done
        order = db.session.get(Order, 1)
        assert (order.user, order.reference, order.idempotency_key) == ("ann", "cart-ann", "k")
        deadletters.abandon([other_id], "given up", CLI)
        assert ledger.check(rows=True).ok
    assert [order["status"] for order in client.get(path_of("bob")).json] == ["CANCELLED"]
    again = purchase(client, "bob", key="k", reference="cart-bob")
    assert (again.status_code, again.json["code"], again.json["orderId"]) == (409, "order_ended", 2)
    assert purchase(client, "bob").status_code == 200
    assert purchase(client, "ann").status_code == 409


def test_the_support_finds_by_user_key_and_reference(client, support, drain):
    purchase(client, "auth0|7", key="key-7", reference="cart-7")
    purchase(client, "cart-7", key="auth0|7")
    purchase(client, 7, reference="auth0|7")
    for _ in range(2):
        answer = support.get("/admin/orders/", query_string={"q": "auth0|7"}).text
        assert re.findall(r">#(\d+)</a>", answer) == ["3", "2", "1"]
        assert answer.count("under this key") == answer.count("under this reference") == 1
        answer = support.get("/admin/orders/", query_string={"q": "cart-7"}).text
        assert re.findall(r">#(\d+)</a>", answer) == ["2", "1"]
        for part in ("auth0", "auth0|77", "Auth0|7", "cart"):
            answer = support.get("/admin/orders/", query_string={"q": part}).text
            assert re.findall(r">#(\d+)</a>", answer) == []
        drain()
    page = support.get("/admin/orders/1").text
    assert "auth0|7" in page
    assert "cart-7" in page
    exported = support.get("/admin/orders/orders.csv").data.decode("utf-8-sig")
    rows = list(csv.DictReader(io.StringIO(exported)))
    assert [(row["user"], row["reference"]) for row in rows] == [
        ("7", "auth0|7"), ("cart-7", ""), ("auth0|7", "cart-7"),
    ]  # fmt: skip


def test_a_users_text_is_no_formula(client, support, drain):
    for user in ("+1-2", "-1", "@sum"):
        purchase(client, user)
    drain()
    exported = support.get("/admin/orders/orders.csv").data.decode("utf-8-sig")
    users = [row["user"] for row in csv.DictReader(io.StringIO(exported))]
    assert users == ["'@sum", "'-1", "'+1-2"]


@pytest.mark.parametrize(
    ("number", "name"),
    [
        ("1", "'a'"), ("NULL", "NULL"), ("NULL", "'1'"), ("NULL", "'9007199254740991'"),
        ("NULL", "''"), ("NULL", "'a b'"), ("NULL", f"'{'x' * 65}'"), ("NULL", "'a/b'"),
    ],
)  # fmt: skip
def test_the_schema_refuses_a_second_form(app, number, name):
    with app.app_context(), pytest.raises(Exception, match="ck_orders_"):
        db.session.execute(
            text(
                "INSERT INTO orders (id, user_id, user_name, product_id, quantity,"
                " unit_price_cents, currency, claimed_at)"
                f" VALUES (1, {number}, {name}, 1, 1, 1, 'USD', now())"
            )
        )


def test_one_order_for_each_text_and_key(app):
    insert = text(
        "INSERT INTO orders (id, user_name, product_id, quantity, unit_price_cents, currency,"
        " claimed_at, idempotency_key) VALUES (:id, :user, 1, 1, 1, 'USD', now(), 'k')"
    )
    with app.app_context():
        db.session.execute(insert, {"id": 1, "user": "ann"})
        db.session.execute(insert, {"id": 2, "user": "Ann"})
        with pytest.raises(Exception, match="uq_orders_idempotency_key_user_name"):
            db.session.execute(insert, {"id": 3, "user": "ann"})
        db.session.rollback()
