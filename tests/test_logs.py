"""Log lines: bounded, one line each, without secrets, and found again by the request's id."""

import io
import json
import logging
import re
from dataclasses import replace

import pytest
import redis
from people import API_TOKEN

from app import logs
from app.config import load_settings
from app.extensions import stock
from app.telling import Bound, BoundLines, ConsoleLines, JsonLines


@pytest.fixture
def lines(monkeypatch):
    """Set the log up as a process does; return a function that tells the lines so far."""
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    output = io.StringIO()

    def configure(**given):
        logs.configure(replace(load_settings({}), **given))
        root.handlers[0].setStream(output)
        monkeypatch.setattr(logs, "_refusals", Bound(logs.REFUSALS_PER_SECOND))
        return lambda: output.getvalue().splitlines()

    yield configure
    root.handlers[:] = before
    root.setLevel(level)


def test_the_clients_id_comes_back(client, buy):
    mine = {"X-Request-Id": "checkout-7f3a:1"}
    body = {"userId": 1, "productId": 1}
    for answer in (
        client.post("/purchase", json=body, headers=mine),
        client.post("/purchase", json=body | {"productId": 9}, headers=mine),
        client.get("/products", headers=mine),
        client.get("/nowhere", headers=mine),
    ):
        assert answer.headers["X-Request-Id"] == "checkout-7f3a:1"


@pytest.mark.parametrize("given", ["", " ", "a b", "x" * 129, "é", "a,b", '"', "<script>", "a;b"])
def test_an_id_that_cannot_be_used_is_replaced(client, given):
    for answer in (
        client.get("/products", headers={"X-Request-Id": given}),
        client.post("/purchase", json={}, headers={"X-Request-Id": given}),
    ):
        assert re.fullmatch("[0-9a-f]{8}-[0-9a-f]+", answer.headers["X-Request-Id"])


def test_every_refusal_is_named_and_no_two_alike(client, buy):
    names = [buy(0).headers["X-Request-Id"] for _ in range(3)]
    names += [client.get("/nowhere").headers["X-Request-Id"] for _ in range(3)]
    assert len(set(names)) == 6
    assert "X-Request-Id" not in buy(1).headers


def test_json_lines(app, client, buy, lines):
    told = lines(log_format="json")
    client.get("/products/99", headers={"X-Request-Id": "abc"})
    (line,) = [json.loads(text) for text in told()]
    assert line["message"] == "GET /products/99"
    assert (line["status"], line["code"]) == (404, "unknown_product")
    assert (line["request_id"], line["client"], line["level"]) == ("abc", "127.0.0.1", "info")
    assert line["time"].endswith("+00:00")


def test_the_purchase_that_is_refused(app, buy, lines):
    told = lines()
    buy(1, product_id=5)
    (line,) = told()
    assert "POST /purchase status=404 code=unknown_product client=127.0.0.1 request_id=" in line


def test_no_line_for_what_is_sold(app, client, buy, drain, lines):
    told = lines()
    buy(1)
    client.get("/products")
    drain()
    assert told() == []


def test_a_line_for_each_where_asked(make_app, lines):
    told = lines(log_level="debug")
    client = make_app(log_level="debug").test_client()
    for user in (1, 2):
        client.post("/purchase", json={"userId": user, "productId": 1})
    sold = [line for line in told() if "app.requests" in line]
    assert len(sold) == 2
    assert 'answer={"status":"queued","orderId":1,' in sold[0]


def test_refusals_are_sampled_and_counted(app, buy, lines, monkeypatch):
    told = lines()
    second = [100.0]
    monkeypatch.setattr("app.telling.time.monotonic", lambda: second[0])
    for _ in range(50):
        buy(0)
    assert len(told()) == 1
    second[0] = 101.0
    buy(0)
    assert len(told()) == 2
    assert "left_out=49" in told()[1]


def test_lines_of_one_kind_are_bounded():
    lines = BoundLines()
    record = logging.LogRecord("a", logging.WARNING, "", 1, "failed %s", (1,), None)
    other = logging.LogRecord("a", logging.WARNING, "", 1, "other", (), None)
    assert sum(lines.filter(record) for _ in range(100)) in (10, 20)  # 20 if a second ended
    assert lines.filter(other)


def test_a_failure_tells_where_and_the_client_nothing(app, client, lines, monkeypatch):
    told = lines(log_format="json")
    secret = "the database is on fire"

    def fail(*_):
        raise RuntimeError(secret)

    monkeypatch.setattr("app.products.catalogue.listed", fail)
    answer = client.get("/products", headers={"X-Request-Id": "abc"})
    assert (answer.status_code, answer.json["code"]) == (500, "internal_error")
    assert secret not in answer.text
    failure = next(json.loads(line) for line in told() if "exception" in line)
    assert failure["request_id"] == "abc"
    assert secret in failure["exception"]


def test_nothing_that_a_client_sent_begins_a_line(app, client, lines):
    told = lines()
    client.get("/products/%0A2026-01-01%20error%20forged%1b[31m%C2%9b%E2%80%A8x")
    (line,) = told()
    assert "\\x0a2026" in line
    assert "\x1b" not in line
    record = logging.LogRecord("a\nb", 20, "", 1, "two\nlines", (), None)
    assert "\n" not in JsonLines().format(record)
    assert "two\\x0alines" in ConsoleLines().format(record)


def test_no_secret_is_logged(make_app, lines, monkeypatch):
    told = lines(log_level="debug", log_format="json")
    secrets = {
        "secret_key": "the-secret-key-0123456789",
        "admin_password": "the-admin-password",
        "metrics_token": "the-metrics-token-0123456789",
    }
    client = make_app(log_level="debug", **secrets).test_client()
    bearer = {"Authorization": "Bearer the-token-of-somebody"}
    client.post("/products/restock", json={"productId": 1, "amount": 1}, headers=bearer)
    client.get("/metrics?token=in-the-query", headers=bearer)
    client.post("/purchase", json={"userId": 1, "productId": 9}, headers=bearer)
    client.get("/products", headers={"Cookie": "session=the-cookie"})
    broken = redis.Redis.from_url("redis://user:the-redis-password@127.0.0.1:1/0")
    monkeypatch.setattr(stock.first, "client", broken)
    client.get("/readyz")
    text = "\n".join(told())
    assert "status" in text
    for word in (
        *secrets.values(),
        "the-token",
        "in-the-query",
        "the-cookie",
        "the-redis-password",
    ):
        assert word not in text, word
    assert API_TOKEN not in text
