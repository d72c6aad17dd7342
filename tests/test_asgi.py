"""The way in that the web server uses: purchases on the event loop, the rest through Flask."""

import asyncio
import json
import os
import signal
import time
from collections import Counter

import pytest

from app.asgi import Application
from app.claims import ClaimScript, LoopLine
from app.extensions import stock
from app.keys import Keys, Unavailable


async def call(application, method, path, body=b"", headers=(), client="127.0.0.1"):
    """Send one request to an ASGI application; return status, headers and body."""
    chunks = [body] if isinstance(body, bytes) else list(body)
    events = [
        {"type": "http.request", "body": chunk, "more_body": number < len(chunks)}
        for number, chunk in enumerate(chunks, start=1)
    ]
    sent = []

    async def receive():
        return events.pop(0) if events else {"type": "http.disconnect"}

    async def send(event):
        sent.append(event)

    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "scheme": "http",
        "http_version": "1.1",
        "root_path": "",
        "headers": [(name.encode(), value.encode()) for name, value in headers],
        "client": (client, 50000),
        "server": ("127.0.0.1", 8000),
    }
    await application(scope, receive, send)
    if not sent:
        return None
    head = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], head, b"".join(event.get("body", b"") for event in sent[1:])


JSON = (("content-type", "application/json"),)


def purchase(user, **more):
    return json.dumps({"userId": user, "productId": 1, **more}).encode()


@pytest.fixture
def application(app):
    """The application on a line of its own: a line belongs to one event loop."""
    settings = app.config["SETTINGS"]
    kept = stock.loop_line
    stock.loop_line = LoopLine(settings.redis_url, kept._script, lambda: None)
    yield Application(app)
    stock.loop_line = kept


def test_both_ways_in_answer_alike(application, client):
    cases = [
        (purchase(1), JSON),
        (purchase(1, quantity=11), JSON),
        (purchase(1, quantity=0), JSON),
        (purchase(2, productId=77), JSON),
        (b"{", JSON),
        (b"{}", (("content-type", "text/plain"),)),
        (b"x" * 20_000, JSON),
        (purchase(3), (*JSON, ("idempotency-key", "k"))),
        (purchase(3), (*JSON, ("idempotency-key", "k"))),
        (purchase(3, quantity=2), (*JSON, ("idempotency-key", "k"))),
        (purchase(3), (*JSON, ("idempotency-key", "caf\u00e9"))),
        (purchase(3), (*JSON, ("content-length", "x"))),
    ]

    async def all_answers():
        return [
            await call(application, "POST", "/purchase", body, headers) for body, headers in cases
        ]

    def comparable(status, headers, body):
        kept = {"ratelimit-policy", "retry-after", "idempotent-replayed", "content-type"}
        body = json.loads(body)
        body.pop("orderId", None)
        return status, {k: v for k, v in headers.items() if k in kept}, body

    on_loop = asyncio.run(all_answers())
    stock.client.delete(*(Keys.rate(user) for user in (1, 2, 3)), Keys.idempotency(3, "k"))
    for (body, headers), answer in zip(cases, on_loop, strict=True):
        environ = {name.replace("-", "_").upper(): value for name, value in headers}
        environ = {
            (name if name.startswith("CONTENT_") else f"HTTP_{name}"): value
            for name, value in environ.items()
        }
        in_thread = client.post("/purchase", data=body, environ_overrides=environ)
        lower = {name.lower(): value for name, value in in_thread.headers}
        assert comparable(*answer) == comparable(in_thread.status_code, lower, in_thread.data)


def test_a_body_in_pieces_and_one_without_end(application):
    async def answers():
        whole = purchase(1)
        pieces = [whole[:5], b"", whole[5:]]
        return (
            await call(application, "POST", "/purchase", pieces, JSON),
            await call(application, "POST", "/purchase", [b" " * 9000] * 50, JSON),
        )

    in_pieces, endless = asyncio.run(answers())
    assert in_pieces[0] == 200
    assert endless[0] == 413


def test_a_client_that_left_buys_nothing(application):
    async def leave():
        return await call(application, "POST", "/purchase", [], JSON)

    assert asyncio.run(leave()) is None
    assert stock.waiting() == 0


def test_other_paths_are_flasks(application):
    async def answers():
        return (
            await call(application, "GET", "/purchase/metrics"),
            await call(application, "GET", "/nowhere"),
        )

    metrics, nowhere = asyncio.run(answers())
    assert json.loads(metrics[2])["stock_remaining"] == 100
    assert (nowhere[0], json.loads(nowhere[2])["code"]) == (404, "not_found")


def test_a_body_that_does_not_come_holds_no_thread(application, monkeypatch):
    monkeypatch.setattr("app.asgi.BODY_SECONDS", 0.1)

    async def answer():
        sent = []

        async def receive():
            await asyncio.Event().wait()

        async def send(event):
            sent.append(event)

        scope = {"type": "http", "method": "POST", "path": "/admin/sign-in", "headers": []}
        await application(scope, receive, send)
        return sent

    sent = asyncio.run(answer())
    assert sent[0]["status"] == 408
    assert json.loads(sent[1]["body"])["code"] == "request_timeout"


def test_hundreds_in_flight_share_a_connection_and_stay_exact(application):
    async def rush():
        line = stock.loop_line
        claims = [line.claim(user, 1, 1, None, "a") for user in range(1, 301)]
        return await asyncio.gather(*claims)

    connections = stock.client.info("stats")["total_connections_received"]
    claims = asyncio.run(rush())
    assert Counter(claim.outcome for claim in claims) == {b"accepted": 100, b"sold_out": 200}
    sold = [claim.detail for claim in claims if claim.outcome == b"accepted"]
    assert sold == list(range(1, 101))
    assert stock.client.info("stats")["total_connections_received"] == connections + 1


def test_a_flushed_script_is_loaded_again(application):
    async def claims():
        line = stock.loop_line
        first = await line.claim(1, 1, 1, None, "a")
        stock.client.script_flush()
        return first, await line.claim(2, 1, 1, None, "a")

    assert [claim.outcome for claim in asyncio.run(claims())] == [b"accepted"] * 2
    assert stock.waiting() == 2


def test_a_cut_connection_is_an_unknown_outcome_and_not_sent_again(application):
    async def claims():
        line = stock.loop_line
        await line.claim(1, 1, 1, None, "a")
        pending = asyncio.ensure_future(line.claim(2, 1, 1, "k", "a"))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        line._channel.abort()
        with pytest.raises(Unavailable):
            await pending
        return await line.claim(3, 1, 1, None, "a")

    assert asyncio.run(claims()).outcome == b"accepted"
    assert stock.view([1]).products[1]["accepted"] <= 3


def test_a_redis_that_hangs_is_given_up_on_and_found_again(application, servers):
    pid = servers[0].process.pid

    async def claims():
        line = stock.loop_line
        await line.claim(1, 1, 1, None, "a")
        os.kill(pid, signal.SIGSTOP)
        try:
            started = time.monotonic()
            tries = [line.claim(user, 1, 1, None, "a") for user in range(2, 66)]
            failed = await asyncio.gather(*tries, return_exceptions=True)
            waited = time.monotonic() - started
            # The next ones connect, wait for an answer, and then fail at once for a while.
            started = time.monotonic()
            tries = [line.claim(user, 1, 1, None, "a") for user in range(66, 130)]
            failed += await asyncio.gather(*tries, return_exceptions=True)
            waited_again = time.monotonic() - started
        finally:
            os.kill(pid, signal.SIGCONT)
        assert all(isinstance(error, Unavailable) for error in failed)
        assert max(waited, waited_again) < 2
        deadline = time.monotonic() + 2
        while True:
            try:
                return await line.claim(200, 1, 1, None, "a")
            except Unavailable:
                assert time.monotonic() < deadline
                await asyncio.sleep(0.05)

    assert asyncio.run(claims()).outcome == b"accepted"


def test_no_redis_at_all(app, tmp_path):
    script = ClaimScript("return 1", app.config["SETTINGS"])

    async def claims():
        line = LoopLine(f"unix://{tmp_path}/nothing.sock", script, lambda: None)
        tries = [line.claim(user, 1, 1, None, "a") for user in range(20)]
        return await asyncio.gather(*tries, return_exceptions=True)

    assert all(isinstance(error, Unavailable) for error in asyncio.run(claims()))


def test_another_sale_in_redis_sells_nothing(app):
    settings = app.config["SETTINGS"]

    async def claim():
        line = LoopLine(settings.redis_url, stock.loop_line._script, lambda: ("another", 5))
        with pytest.raises(Unavailable):
            await line.claim(1, 1, 1, None, "a")

    asyncio.run(claim())
    assert stock.waiting() == 0
