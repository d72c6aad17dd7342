"""One form of rate-limit headers and refusals, whoever keeps the limit."""

import re

import pytest

from app.audit import CLI
from app.config import NO_LIMIT, RateLimit
from app.extensions import stock
from app.staff import tokens
from app.web import limits as web_limits

POLICY = re.compile(r'"([a-z_]+)";q=(\d+);w=(\d+)').fullmatch
STATE = re.compile(r'"([a-z_]+)";r=(\d+);t=(\d+)').fullmatch


def read(answer):
    """Return name, quota, window, left, seconds; fail where the headers disagree."""
    policy, state = POLICY(answer.headers["RateLimit-Policy"]), STATE(answer.headers["RateLimit"])
    assert policy[1] == state[1]
    assert not [name for name, _ in answer.headers if name.lower().startswith("x-ratelimit")]
    quota, window, left, seconds = (
        int(text) for text in (*policy.groups()[1:], *state.groups()[1:])
    )
    assert 0 <= left < quota
    assert 0 < seconds <= window
    return policy[1], quota, window, left, seconds


def test_the_purchase(buy):
    for left in (4, 3, 2, 1, 0):
        answer = buy(1)
        assert read(answer)[:4] == ("user", 5, 60, left)
        assert "Retry-After" not in answer.headers
    refused = buy(1)
    assert refused.status_code == 429
    assert refused.json == {"error": "Too many requests", "code": "rate_limited", "limit": "user"}
    name, _, _, left, seconds = read(refused)
    assert (name, left) == ("user", 0)
    assert refused.headers["Retry-After"] == str(seconds)


def test_the_address(make_app):
    client = make_app(purchase_address_limit=RateLimit(1, 60_000)).test_client()
    answers = [client.post("/purchase", json={"userId": i, "productId": 1}) for i in (1, 2)]
    assert [answer.status_code for answer in answers] == [200, 429]
    name, quota, _, _, seconds = read(answers[1])
    assert (name, quota) == ("address", 1)
    assert answers[1].headers["Retry-After"] == str(seconds)
    assert answers[1].json["limit"] == "address"


def test_a_refusal_that_is_none_of_the_rate(buy):
    assert "Retry-After" not in buy(1, quantity=101).headers
    assert "RateLimit" not in buy(0).headers


@pytest.mark.parametrize("path", ["/products", "/purchase/metrics", "/purchase/orders/1"])
def test_the_other_routes(client, path):
    for left in (599, 598):
        answer = client.get(path)
        assert answer.status_code == 200
        assert "Retry-After" not in answer.headers
        assert read(answer)[1:4] == (600, 60, left)


def test_the_other_routes_refuse_alike(client):
    path = "/products/99"
    name = read(client.get(path))[0]
    # The next 598 at once: one by one they take a slow machine longer than the minute.
    (key,) = stock.raw_client.keys("LIMITS*")
    stock.raw_client.incrby(key, 598)
    assert client.get(path).status_code == 404
    refused = client.get(path)
    assert refused.status_code == 429
    assert refused.json == {"error": "Too many requests", "code": "rate_limited", "limit": "lookup"}
    again, _, _, left, seconds = read(refused)
    assert (again, left) == (name, 0)
    assert refused.headers["Retry-After"] == str(seconds)
    # Errors of a limited route tell its limit too.
    assert read(client.post("/products/restock"))[0] == "failed_token"
    # Each route by itself.
    assert client.get("/products").status_code == 200


def test_what_has_no_limit_tells_none(client):
    for path in ("/healthz", "/readyz", "/docs", "/nowhere"):
        assert "RateLimit" not in client.get(path).headers


LOOKUPS = ("/products", "/products/1", "/purchase/metrics", "/purchase/orders/1")


@pytest.mark.parametrize("path", LOOKUPS)
def test_look_ups_have_a_setting(make_app, path):
    client = make_app(lookup_limit=RateLimit(2, 60_000)).test_client()
    assert [client.get(path).status_code for _ in range(3)] == [200, 200, 429]
    assert client.get(path).json["limit"] == "lookup"


@pytest.mark.parametrize("path", LOOKUPS)
def test_look_ups_without_a_limit(make_app, path):
    answer = make_app(lookup_limit=NO_LIMIT).test_client().get(path)
    assert answer.status_code == 200
    assert "RateLimit" not in answer.headers


TOKEN_ROUTES = (("POST", "/products"), ("PATCH", "/products/1"), ("POST", "/products/restock"))


@pytest.mark.parametrize(("method", "path"), TOKEN_ROUTES)
def test_a_valid_token_is_limited_by_itself_and_wrong_ones_by_address(
    make_app, admin_headers, monkeypatch, method, path
):
    monkeypatch.setattr(web_limits, "FAILED_TOKEN_LIMIT", "2/minute")
    app = make_app(api_token_limit=RateLimit(2, 60_000))
    client = app.test_client()
    with app.app_context():
        _, other = tokens.create("another", ["*"], CLI)

    def send(token):
        return client.open(path, method=method, json={}, headers={"Authorization": token})

    refused = [send("Bearer wrong") for _ in range(3)]
    assert [answer.status_code for answer in refused] == [401, 401, 429]
    assert refused[2].json["limit"] == "failed_token"
    for token in (admin_headers["Authorization"], f"Bearer {other}"):
        answers = [send(token) for _ in range(3)]
        assert [answer.status_code for answer in answers][2] == 429
        assert {answer.status_code for answer in answers[:2]} <= {200, 400}
        assert answers[2].json["limit"] == "token"
        assert answers[2].headers["Retry-After"] == str(read(answers[2])[4])


def test_by_default_a_valid_token_has_no_limit(client, admin_headers):
    answer = client.patch("/products/1", json={}, headers=admin_headers)
    assert answer.status_code in (200, 400)
    assert "RateLimit" not in answer.headers
