"""Hundreds of wrong requests: each gets its documented 4xx as JSON, and none changes anything."""

import itertools
import json

import pytest

WRONG_INTEGERS = [
    0, -1, 2**53, 10**30, 1.0, 1.5, -0.0, True, False, None, "", "1", " 1", "one", [], [1], {},
    {"a": 1},
]  # fmt: skip
# A text may name a user, but not every text.
WRONG_USERS = [value for value in WRONG_INTEGERS if value not in ("1", "one")]
WRONG_USERS += ["one two", "a/b", ".", "..", "ü", "one\n", "x" * 65]
WRONG = {"userId": WRONG_USERS, "productId": WRONG_INTEGERS, "quantity": WRONG_INTEGERS}
WRONG_BODIES = [
    b"", b" ", b"{", b"}", b"{}x", b"[]", b"[1,2]", b"null", b"true", b"1", b'"text"', b"{'a':1}",
    b'{"userId":}', b'{"userId":1,}', b"\xff\xfe", b'{"userId":1,"productId":1,"quantity":01}',
    b"[" * 5000, b'{"a":' * 3000, b'{"userId":' + b"9" * 5000 + b"}", b"\x00", b"NaN",
    b'{"userId":NaN,"productId":1}', b'{"userId":Infinity,"productId":1}',
    b'{"userId":1e3,"productId":1}', b"\xef\xbb\xbf{}", b"a" * 16_384,
]  # fmt: skip
WRONG_KEYS = ["", " ", "a b", "x" * 256, "\x7f", "caf\u00e9", "tab\there"]
WRONG_TYPES = [
    None, "", "text/plain", "application/x-www-form-urlencoded", "application/jsonx",
    "text/json", "multipart/form-data", "application/xml", "json", ";application/json",
]  # fmt: skip


def wrong_objects():
    good = {"userId": 1, "productId": 1, "quantity": 1}
    for field in good:
        for value in WRONG[field]:
            yield field, {**good, field: value}
            yield field, {"userId": 1, "productId": 1, field: value}
    for missing in ("userId", "productId"):
        yield missing, {name: value for name, value in good.items() if name != missing}
    # Several wrong at once: the first in the documented order is named.
    for user, product in itertools.product(WRONG_USERS, WRONG_INTEGERS):
        yield "userId", {"userId": user, "productId": product}


@pytest.fixture
def unchanged(client, app):
    """Fail when the test changed stock or made an order."""
    yield
    metrics = client.get("/purchase/metrics").json
    assert metrics == {"stock_remaining": 100, "queue_depth": 0, "total_processed": 0}


@pytest.mark.usefixtures("unchanged")
def test_wrong_fields(client):
    cases = list(wrong_objects())
    assert len(cases) > 400
    for field, body in cases:
        answer = client.post("/purchase", json=body)
        assert (answer.status_code, answer.json["code"]) == (400, "invalid_request"), body
        assert answer.json["field"] == field, body
        assert answer.json["error"]


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("route", ["/purchase", "/products/restock", "/products"])
def test_wrong_bodies(client, admin_headers, route):
    for body in WRONG_BODIES:
        answer = client.post(
            route, data=body, headers={"Content-Type": "application/json", **admin_headers}
        )
        assert (answer.status_code, answer.json["code"]) == (400, "invalid_request"), body


@pytest.mark.usefixtures("unchanged")
def test_wrong_keys(client):
    for key in WRONG_KEYS:
        answer = client.post(
            "/purchase",
            json={"userId": 1, "productId": 1},
            environ_overrides={"HTTP_IDEMPOTENCY_KEY": key},
        )
        assert (answer.status_code, answer.json["field"]) == (400, "Idempotency-Key"), key


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("route", ["/purchase", "/products/restock", "/products"])
def test_wrong_content_types(client, admin_headers, route):
    body = json.dumps({"userId": 1, "productId": 1, "amount": 1})
    for media_type in WRONG_TYPES:
        answer = client.post(route, data=body, content_type=media_type, headers=admin_headers)
        assert (answer.status_code, answer.json["code"]) == (415, "unsupported_media_type")


@pytest.mark.parametrize(
    "media_type", ["application/json; charset=utf-8", "Application/JSON", "application/json ;x=y"]
)
def test_right_content_types(client, media_type):
    body = b'{"userId":1,"productId":1}'
    assert client.post("/purchase", data=body, content_type=media_type).status_code == 200


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("route", ["/purchase", "/products/restock", "/products"])
def test_huge_bodies(client, admin_headers, route):
    body = b'{"userId":1,"productId":1,"x":"' + b"x" * 20_000 + b'"}'
    answer = client.post(route, data=body, content_type="application/json", headers=admin_headers)
    assert (answer.status_code, answer.json["code"]) == (413, "body_too_large")


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize(
    "terms",
    [
        {"name": ""}, {"name": " "}, {"name": "x" * 201}, {"name": 1}, {"name": None},
        {"name": "a\0b"}, {"name": "\ud800"},
        {"priceCents": -1}, {"priceCents": 1.5}, {"priceCents": "1"}, {"priceCents": 2**53},
        {"currency": "usd"}, {"currency": "EURO"}, {"currency": 1}, {"currency": "E\n"},
        {"stock": -1}, {"stock": 10_000_001}, {"stock": "1"}, {"stock": None},
        {"opensAt": "tomorrow"}, {"opensAt": "2026-01-01"}, {"opensAt": "2026-01-01T00:00:00"},
        {"opensAt": 5}, {"opensAt": "2026-13-01T00:00:00Z"}, {"opensAt": "9999-01-01T00:00:00Z"},
        {"opensAt": "0001-01-01T00:00:00+23:59"}, {"opensAt": "2026-01-01T00:00:00+25:00"},
        {"closesAt": "1900-01-01T00:00:00Z"}, {"closesAt": True},
        {"opensAt": "2026-01-02T00:00:00Z", "closesAt": "2026-01-01T00:00:00Z"},
        {"perUserLimit": 0}, {"perUserLimit": 1_000_001}, {"perUserLimit": "3"},
        {"maxQuantity": 0}, {"maxQuantity": None}, {"paused": 1}, {"paused": None},
        {"colour": "red"}, {"id": 5}, {"version": 3}, {"stockRemaining": 4},
    ],
)  # fmt: skip
def test_wrong_products(client, admin_headers, terms):
    good = {"name": "Lamp", "priceCents": 100, "currency": "EUR", "stock": 5}
    answer = client.post("/products", json=good | terms, headers=admin_headers)
    assert (answer.status_code, answer.json["code"]) == (400, "invalid_request")
    assert answer.json["field"] in terms
    answer = client.patch("/products/1", json=terms, headers=admin_headers)
    assert (answer.status_code, answer.json["code"]) == (400, "invalid_request")
    assert len(client.get("/products").json) == 1
    assert client.get("/products/1").json["name"] == "Flash-sale item"


@pytest.mark.usefixtures("unchanged")
def test_wrong_restocks(client, admin_headers):
    for field, value in itertools.product(
        ("productId", "amount"), [*WRONG_INTEGERS, 2_000_000_000]
    ):
        body = {"productId": 1, "amount": 5, field: value}
        answer = client.post("/products/restock", json=body, headers=admin_headers)
        if field == "productId" and value == 2_000_000_000:
            assert (answer.status_code, answer.json["code"]) == (404, "unknown_product")
        else:
            assert (answer.status_code, answer.json["field"]) == (400, field), body
    for reason in ("", "x" * 501, 5, [], "\0"):
        body = {"productId": 1, "amount": 5, "reason": reason}
        answer = client.post("/products/restock", json=body, headers=admin_headers)
        assert (answer.status_code, answer.json["field"]) == (400, "reason"), reason
    body = {"productId": 1, "amount": 5, "raeson": "misspelt"}
    answer = client.post("/products/restock", json=body, headers=admin_headers)
    assert (answer.status_code, answer.json["field"]) == (400, "raeson")


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize(
    "path",
    [
        "/purchase/orders/a%20b", "/purchase/orders/%25", "/purchase/orders/" + "x" * 65,
        "/purchase/orders/%00", "/purchase/orders/%E0%A5%AA", "/purchase/orders/%2E%2E",
        "/purchase/orders/1?limit=0", "/purchase/orders/1?limit=501", "/purchase/orders/1?limit=x",
        "/purchase/orders/1?limit=", "/purchase/orders/1?before=0", "/purchase/orders/1?before=-5",
        "/purchase/metrics?productId=x", "/purchase/metrics?productId=0",
    ],
)  # fmt: skip
def test_wrong_lookups(client, path):
    answer = client.get(path)
    assert (answer.status_code, answer.json["code"]) == (400, "invalid_request")


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("/nowhere", "not_found"),
        ("/purchase/", "not_found"),
        ("/purchase/orders", "not_found"),
        ("/products/999", "unknown_product"),
        ("/products/99999999999999999999", "unknown_product"),
        ("/purchase/metrics?productId=999", "unknown_product"),
    ],
)
def test_unknown_paths(client, path, code):
    answer = client.get(path)
    assert (answer.status_code, answer.json["code"]) == (404, code)
    assert answer.json["error"]


@pytest.mark.parametrize(
    ("method", "path"),
    [("post", "/products/1"), ("delete", "/products"), ("put", "/purchase/metrics")],
)
def test_wrong_methods(client, method, path):
    answer = getattr(client, method)(path)
    assert (answer.status_code, answer.json["code"]) == (405, "method_not_allowed")
    assert answer.headers["Allow"]
