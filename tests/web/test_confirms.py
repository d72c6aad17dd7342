"""Confirmations on the event loop: gathered, decided together, bounded where PostgreSQL is slow."""

import asyncio
import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from people import API_TOKEN
from sqlalchemy import text
from waiting import patience

from app.audit import CLI
from app.extensions import db, stock
from app.products import catalogue
from app.web import confirms
from app.web.confirms import Confirms
from app.web.request import Request


@pytest.fixture
def held(app, drain):
    """Four stored orders that are held."""
    with app.app_context():
        catalogue.change(1, {"hold_seconds": 60}, CLI)
        orders = [stock.claim(n, 1, 1, None, "a").detail for n in range(1, 5)]
    drain()
    return orders


def asked(order: int, token: str = API_TOKEN, key: str | None = None) -> Request:
    request = Request({"REMOTE_ADDR": "127.0.0.1"})
    headers = [
        (b"authorization", f"Bearer {token}".encode()),
        (b"content-type", b"application/json"),
    ]
    if key:
        headers.append((b"idempotency-key", key.encode()))
    url = f"/orders/{order}/confirm".encode()
    request.is_page("POST", url, "1.1", headers, ("127.0.0.1", 80))
    request.body += json.dumps({"payment": f"pi_{order}"}).encode()
    return request


def answers(confirms: Confirms, *requests: Request) -> list:
    async def ask():
        told = (confirms.answer(request, "127.0.0.1") for request in requests)
        return await asyncio.gather(*told)

    return asyncio.run(ask())


def test_those_of_a_moment_are_answered_as_the_view_does(app, client, admin_headers, held):
    gathers = Confirms(app)
    told = answers(gathers, *(asked(order, key=f"k{order}") for order in held[:2]))
    assert [answer.status for answer in told] == ["200 OK"] * 2
    assert [json.loads(answer.body)["payment"] for answer in told] == ["pi_1", "pi_2"]
    shown = client.get("/orders/1", headers=admin_headers)
    assert json.loads(told[0].body) == shown.json
    headers = admin_headers | {"Idempotency-Key": "k3"}
    viewed = client.post("/orders/3/confirm", json={"payment": "pi_3"}, headers=headers)
    assert list(viewed.json) == list(json.loads(told[0].body))
    own = {"X-Request-Id", "Content-Length"}
    assert dict(viewed.headers).keys() - own == dict(told[0].headers).keys() - own
    (again,) = answers(gathers, asked(1, key="k1"))
    assert (again.body, dict(again.headers)["Idempotent-Replayed"]) == (told[0].body, "true")


def test_who_was_answered_together_is_waited_for(app, held, monkeypatch):
    """And who asks alone is not kept waiting: with the pause made long, that would be seen."""
    monkeypatch.setattr(confirms, "GATHER_SECONDS", 600)
    gathers = Confirms(app)
    turns, decide = [], gathers._decide

    def noted(turn):
        turns.append([each.order_id for each in turn])
        return decide(turn)

    monkeypatch.setattr(gathers, "_decide", noted)

    async def ask() -> None:
        ones = [gathers.answer(asked(order), "127.0.0.1") for order in (*held, held[0])]
        await ones[0]
        await asyncio.gather(*ones[1:3])
        third = asyncio.create_task(ones[3])
        # Its turn has begun before the next one comes.
        while not gathers._waiting:
            await asyncio.sleep(0)
        await asyncio.gather(third, ones[4])

    asyncio.run(asyncio.wait_for(ask(), patience(30)))
    assert turns == [held[:1], held[1:3], [held[3], held[0]]]


def test_what_is_special_is_the_views(app, held):
    gathers = Confirms(app)
    assert answers(gathers, asked(99), asked(1, token="fst_nobody-has-this")) == [None, None]
    with app.app_context():
        assert set(db.session.scalars(text("SELECT status FROM orders"))) == {"HELD"}


ODD = {
    "no token": ("authorization", None),
    "another scheme": ("authorization", "Basic YTpi"),
    "compressed": ("content-encoding", "gzip"),
    "a form": ("content-type", "application/x-www-form-urlencoded"),
    "no type": ("content-type", None),
    "no key": ("idempotency-key", "two words"),
    "an empty key": ("idempotency-key", ""),
}


@pytest.mark.parametrize("odd", ODD)
def test_odd_headers_are_the_views_to_refuse(app, client, held, odd):
    name, value = ODD[odd]
    request = asked(1)
    kept = [each for each in request.headers if each[0] != name.encode()]
    request.headers = kept + ([(name.encode(), value.encode())] if value is not None else [])
    assert answers(Confirms(app), request) == [None]
    headers = {header.decode(): text.decode() for header, text in request.headers}
    answer = client.post("/orders/1/confirm", data=bytes(request.body), headers=headers)
    assert answer.status_code in (400, 401, 415)


@pytest.mark.parametrize("body", [b"[]", b"{", b'{"payment":7}', b'{"paid":"x"}'])
def test_odd_bodies_are_the_views_to_refuse(app, client, admin_headers, held, body):
    request = asked(1)
    request.body[:] = body
    assert answers(Confirms(app), request) == [None]
    headers = admin_headers | {"Content-Type": "application/json"}
    assert client.post("/orders/1/confirm", data=body, headers=headers).status_code == 400


def test_doubled_headers_are_the_views_to_refuse(app, held):
    request = asked(1)
    request.headers = [*request.headers, (b"authorization", b"Bearer fst_another")]
    assert answers(Confirms(app), request) == [None]


def test_a_locked_order_keeps_nobody_else_waiting(app, held):
    with app.app_context():
        db.session.execute(text("SELECT FROM orders WHERE id = 2 FOR UPDATE"))
        with ThreadPoolExecutor(1) as other:
            told = other.submit(answers, Confirms(app), *map(asked, held)).result()
        assert [answer and answer.status for answer in told] == [
            "200 OK", None, "200 OK", "200 OK",
        ]  # fmt: skip
        db.session.rollback()


def test_a_postgresql_that_is_too_slow_answers_all_at_once(app, held):
    """Not one after the other, each in a page's thread."""
    with app.app_context():
        db.session.execute(text("LOCK TABLE orders"))
        begun = time.monotonic()
        with ThreadPoolExecutor(1) as other:
            told = other.submit(answers, Confirms(app), *map(asked, held)).result()
        assert time.monotonic() - begun > 0.8
        assert {answer.status for answer in told} == {"503 Service Unavailable"}
        assert {dict(answer.headers)["Retry-After"] for answer in told} == {"1"}
        db.session.rollback()
    assert [answer.status for answer in answers(Confirms(app), *map(asked, held))] == ["200 OK"] * 4
