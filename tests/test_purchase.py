"""POST /purchase: the documented answers, one by one."""

from datetime import UTC, datetime, timedelta

import pytest


def test_sells_and_persists(client, buy, drain):
    answer = buy(1)
    assert (answer.status_code, answer.json) == (200, {"status": "queued", "orderId": 1})
    assert answer.headers["RateLimit-Policy"] == '"user";q=5;w=60'
    assert answer.headers["RateLimit"] == '"user";r=4;t=60'
    assert client.get("/purchase/orders/1").json[0]["status"] == "QUEUED"
    assert drain() == 1
    (order,) = client.get("/purchase/orders/1").json
    assert (order["id"], order["status"], order["quantity"]) == (1, "CONFIRMED", 1)
    metrics = client.get("/purchase/metrics").json
    assert metrics == {"stock_remaining": 99, "queue_depth": 0, "total_processed": 1}
