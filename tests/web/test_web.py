"""One process of the web server: purchases past uvicorn's ASGI, the rest through Flask."""

import asyncio
import json
from contextlib import suppress

import pytest
from waiting import patience
from wire import ask, post, purchase, serving

from app.extensions import stock
from app.stock.keys import KEYS

JSON = "Content-Type: application/json"


def test_both_ways_in_answer_alike(app, client):
    cases = [
        (json.dumps({"userId": 1, "productId": 1}).encode(), (JSON,)),
        (b'{"userId":1,"productId":1,"quantity":11}', (JSON,)),
        (b'{"userId":1,"productId":1,"quantity":0}', (JSON,)),
        (b'{"userId":2,"productId":77}', (JSON,)),
        (b"{", (JSON,)),
        (b"{}", ("Content-Type: text/plain",)),
        (b"{}", ()),
        (b"x" * 20_000, (JSON,)),
        (b'{"userId":3,"productId":1}', (JSON, "Idempotency-Key: k")),
        (b'{"userId":3,"productId":1}', (JSON, "Idempotency-Key: k")),
        (b'{"userId":3,"productId":1,"quantity":2}', (JSON, "Idempotency-Key: k")),
        (b'{"userId":3,"productId":1}', (JSON, "Idempotency-Key: caf\u00e9")),
        (b'{"userId":4,"productId":1}', (JSON, "X-Request-Id: mine")),
    ]

    def comparable(status, headers, body):
        kept = {"ratelimit-policy", "retry-after", "idempotent-replayed", "content-type"}
        body = json.loads(body)
        body.pop("orderId", None)
        return status, {k: v for k, v in headers.items() if k in kept}, body

    replies = ask(app, *(post(body, *headers) for body, headers in cases))
    stock.client.delete(*KEYS.attempts, KEYS.idempotency(3, "k")[0])
    for (body, lines), reply in zip(cases, replies, strict=True):
        headers = dict(line.split(": ") for line in lines)
        in_thread = client.post("/purchase", data=body, headers=headers)
        lower = {name.lower(): value for name, value in in_thread.headers}
        assert comparable(*reply) == comparable(in_thread.status_code, lower, in_thread.data)
        if "X-Request-Id" in headers:
            assert reply.headers["x-request-id"] == lower["x-request-id"] == "mine"


def test_other_paths_are_flasks(app):
    metrics, nowhere, encoded, slashed = ask(
        app,
        b"GET /purchase/metrics?productId=1 HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /nowhere HTTP/1.1\r\nHost: a\r\n\r\n",
        purchase(1).replace(b"/purchase", b"/%70urchase"),
        purchase(2).replace(b"/purchase", b"/purchase?utm=1"),
    )
    assert metrics.json["stock_remaining"] == 100
    assert (nowhere.status, nowhere.json["code"]) == (404, "not_found")
    assert (encoded.status, slashed.status) == (200, 200)
    assert stock.waiting() == 2


def test_other_methods(app):
    async def talk():
        async with serving(app) as process:
            wire = await process.connect()
            replies = []
            for method in (b"GET", b"PUT", b"DELETE", b"OPTIONS"):
                wire.send(method + b" /purchase HTTP/1.1\r\nHost: a\r\n\r\n")
                replies.append(await wire.reply())
            wire.send(b"HEAD /purchase HTTP/1.1\r\nHost: a\r\n\r\n")
            replies.append(await wire.reply(head_only=True))
            # A body after the answer to HEAD would be read as the next answer.
            wire.send(purchase(1))
            return replies, await wire.reply()

    replies, bought = asyncio.run(talk())
    assert {(reply.status, reply.headers["allow"]) for reply in replies} == {(405, "POST")}
    assert bought.status == 200


def test_a_body_in_pieces(app):
    async def talk():
        async with serving(app) as process:
            wire = await process.connect()
            request = purchase(1)
            for byte in request:
                wire.send(bytes([byte]))
                await asyncio.sleep(0)
            piecewise = await wire.reply()
            body = b'{"userId":2,"productId":1}'
            wire.send(post(b"", JSON, "Transfer-Encoding: chunked", length=False))
            for byte in body:
                wire.send(b"1\r\n%c\r\n" % byte)
            wire.send(b"0\r\n\r\n")
            chunked = await wire.reply()
            wire.send(post(b"", JSON, "Expect: 100-continue", "Content-Length: 26", length=False))
            assert (await wire.reply()).status == 100
            wire.send(body.replace(b"2", b"3"))
            return piecewise, chunked, await wire.reply()

    assert [reply.status for reply in asyncio.run(talk())] == [200, 200, 200]
    assert stock.waiting() == 3


def test_bodies_without_end_are_refused_unread(app):
    async def talk(*parts):
        async with serving(app) as process:
            wire = await process.connect()
            for part in parts:
                wire.send(part)
            return await wire.reply(), await wire.is_closed()

    announced = post(b"", JSON, "Content-Length: 9999999999", length=False)
    chunked = post(b"", JSON, "Transfer-Encoding: chunked", length=False)
    chunk = b"2000\r\n" + b" " * 0x2000 + b"\r\n"
    for parts in ([announced], [chunked, *[chunk] * 500]):
        reply, closed = asyncio.run(talk(*parts))
        assert (reply.status, reply.json["code"], closed) == (413, "body_too_large", True)
        assert reply.headers["connection"] == "close"


def test_requests_sent_ahead_are_answered_in_order(app):
    async def talk():
        async with serving(app) as process:
            wire = await process.connect()
            page = b"GET /purchase/metrics HTTP/1.1\r\nHost: a\r\n\r\n"
            ahead = [purchase(1), page, purchase(2), purchase(3, quantity=0), page, purchase(4)]
            wire.send(b"".join(ahead) + purchase(5)[:-5])
            replies = [await wire.reply() for _ in ahead]
            wire.send(purchase(5)[-5:])
            return [*replies, await wire.reply()]

    replies = asyncio.run(talk())
    assert [reply.status for reply in replies] == [200, 200, 200, 400, 200, 200, 200]
    orders = [reply.json["orderId"] for reply in replies if "orderId" in reply.json]
    assert orders == [1, 2, 3, 4]
    assert replies[1].json["stock_remaining"] == 99


def test_thousands_sent_ahead(app):
    async def talk():
        async with serving(app) as process:
            wire = await process.connect()
            wire.send(b"".join(purchase(user) for user in range(1, 3001)))
            return [(await wire.reply()).status for _ in range(3000)]

    statuses = asyncio.run(talk())
    assert (statuses[:100], set(statuses[100:])) == ([200] * 100, {409})


def test_a_client_that_leaves_early_buys_nothing(app):
    async def talk():
        async with serving(app) as process:
            wire = await process.connect()
            wire.send(purchase(1)[:-1])
            await wire.writer.drain()
            wire.close()
            # Another one's purchase, so that the server has surely seen the end of the first.
            wire = await process.connect()
            wire.send(purchase(2))
            return await wire.reply()

    assert asyncio.run(talk()).json["orderId"] == 1
    assert stock.waiting() == 1


def test_who_asks_to_close_is_closed(app):
    async def talk(request):
        async with serving(app) as process:
            wire = await process.connect()
            wire.send(request)
            return await wire.reply(), await wire.is_closed()

    old = purchase(2).replace(b"HTTP/1.1", b"HTTP/1.0")
    page = b"GET /healthz HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
    for request, status in {
        purchase(1, "Connection: close"): 200,
        old: 200,
        page: 200,
    }.items():
        reply, closed = asyncio.run(talk(request))
        assert (reply.status, reply.headers["connection"], closed) == (status, "close", True)
    assert stock.waiting() == 2


def test_nothing_is_bought_after_the_last_answer(app):
    last, ahead = purchase(1, "Connection: close"), purchase(2) + purchase(3)[:-5]

    async def talk():
        async with serving(app) as process:
            wire = await process.connect()
            wire.send(last + ahead)
            reply, closed = await wire.reply(), await wire.is_closed()
            wire.send(purchase(3)[-5:])
            await asyncio.sleep(0.1)
            return reply, closed

    reply, closed = asyncio.run(talk())
    assert (reply.status, reply.headers["connection"], closed) == (200, "close", True)
    assert stock.waiting() == 1


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"POST /pur",
        b"GET /healthz HTTP/1.1\r\nHost: a\r\n",
        purchase(1) + b"POST",
        b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n",
    ],
    ids=["nothing", "half a line", "half a head", "half a second one", "and then nothing"],
)
def test_who_is_slow_is_closed(app, monkeypatch, sent):
    monkeypatch.setattr("app.web.protocol.HEAD_SECONDS", 0.2)

    async def talk():
        async with serving(app) as process:
            wire = await process.connect()
            wire.send(sent)
            if b"\r\n\r\n" in sent:
                assert (await wire.reply()).status == 200
            return await asyncio.wait_for(wire.is_closed(), patience(5))

    assert asyncio.run(talk())


@pytest.mark.parametrize("path", [b"/purchase", b"/admin/sign-in"])
def test_a_body_that_does_not_come_holds_nobody_up(app, monkeypatch, path):
    monkeypatch.setattr("app.web.protocol.BODY_SECONDS", 0.2)

    async def talk():
        async with serving(app) as process:
            wire = await process.connect()
            wire.send(purchase(1)[:-1].replace(b"/purchase", path))
            return await asyncio.wait_for(wire.reply(), patience(5)), await wire.is_closed()

    reply, closed = asyncio.run(talk())
    assert (reply.status, reply.json["code"], closed) == (408, "request_timeout", True)
    assert stock.waiting() == 0


def test_who_does_not_read_is_cut(app, monkeypatch):
    monkeypatch.setattr("app.web.protocol.READ_SECONDS", 0.2)

    async def talk():
        async with serving(app) as process:
            wire = await process.connect()
            wire.reader._transport.pause_reading()
            with suppress(ConnectionError):
                while True:
                    wire.send(b"GET /openapi.json HTTP/1.1\r\nHost: a\r\n\r\n")
                    await wire.writer.drain()
            return len(process.server.server_state.connections)

    assert asyncio.run(asyncio.wait_for(talk(), patience(30))) == 0


def test_a_head_without_end(app):
    async def talk():
        async with serving(app) as process:
            wire = await process.connect()
            wire.send(b"POST /purchase HTTP/1.1\r\nHost: a\r\n")
            for number in range(1000):
                wire.send(b"X-%d: %s\r\n" % (number, b"x" * 1000))
                await asyncio.sleep(0)
                if process.server.server_state.connections == set() and number > 1:
                    break
            return await wire.reply()

    reply = asyncio.run(talk())
    assert (reply.status, reply.json["code"]) == (431, "head_too_large")


def test_no_request_at_all(app):
    (reply,) = ask(app, b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n")
    assert (reply.status, reply.json["code"]) == (400, "invalid_request")
    assert reply.headers["connection"] == "close"


def test_what_was_asked_before_a_malformed_request_is_answered(app):
    async def talk():
        async with serving(app) as process:
            wire = await process.connect()
            wire.send(purchase(1) + b"\x16\x03\r\n\r\n" + purchase(2))
            return await wire.reply(), await wire.reply(), await wire.is_closed()

    bought, refused, closed = asyncio.run(talk())
    assert bought.status == 200
    assert (refused.status, refused.headers["connection"], closed) == (400, "close", True)
    assert stock.waiting() == 1


def test_too_many_connections(app):
    async def talk():
        async with serving(app) as process:
            process.server.server_state.most_connections = 2
            first, second, third = [await process.connect() for _ in range(3)]
            refused = await third.reply()
            assert await third.is_closed()
            first.send(purchase(1))
            bought = await first.reply()
            second.close()
            while len(process.server.server_state.connections) > 1:
                await asyncio.sleep(0.01)
            again = await process.connect()
            again.send(purchase(2))
            return refused, bought, await again.reply()

    refused, bought, again = asyncio.run(talk())
    assert (refused.status, refused.json["code"]) == (503, "unavailable")
    assert refused.headers["retry-after"] == "1"
    assert (bought.status, again.status) == (200, 200)


def test_the_end_cuts_nobody_off(app):
    """A kept connection gets one more answer, which says that it is the last."""

    async def talk():
        async with serving(app) as process:
            busy, idle, page = [await process.connect() for _ in range(3)]
            for wire in (busy, idle):
                wire.send(purchase(1, "Idempotency-Key: k"))
                assert (await wire.reply()).headers.get("connection") is None
            process.server.should_exit = True
            while not process.server.server_state.ending:
                await asyncio.sleep(0.01)
            busy.send(purchase(2))
            page.send(b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n")
            last = [await busy.reply(), await page.reply()]
            return last, [await wire.is_closed() for wire in (busy, idle, page)]

    last, closed = asyncio.run(talk())
    assert [(reply.status, reply.headers["connection"]) for reply in last] == [(200, "close")] * 2
    assert closed == [True] * 3
