"""One form of rate-limit headers and refusals, whoever keeps the limit."""

import re

import pytest

from app.config import RateLimit
from app.extensions import stock

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
    assert refused.json == {"error": "Too many requests", "code": "rate_limited"}
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
    assert refused.json == {"error": "Too many requests", "code": "rate_limited"}
    again, _, _, left, seconds = read(refused)
    assert (again, left) == (name, 0)
    assert refused.headers["Retry-After"] == str(seconds)
    # Errors of a limited route tell its limit too.
    assert read(client.post("/products/restock"))[0] == "restock"


def test_what_has_no_limit_tells_none(client):
    for path in ("/healthz", "/readyz", "/docs", "/nowhere"):
        assert "RateLimit" not in client.get(path).headers
