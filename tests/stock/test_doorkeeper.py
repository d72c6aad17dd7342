"""Users over their limit are turned away at the door, and counted as if Redis had refused them."""

import asyncio
import time

from counts import commandstats
from waiting import patience
from wire import purchase, serving

from app.extensions import stock
from app.stock.keys import KEYS


def limited_count(product=1) -> int:
    return int(stock.client.hget(KEYS.product(product), "limited") or 0)


def run(app, talk):
    async def whole():
        async with serving(app) as process:
            wire = await process.connect()

            async def ask(request):
                wire.send(request)
                return await wire.reply()

            return await talk(ask)

    return asyncio.run(whole())


def test_redis_is_asked_once_a_second(app):
    async def talk(ask):
        first = [(await ask(purchase(1))).status for _ in range(6)]
        before = commandstats()["evalsha"]
        started = time.monotonic()
        more = [await ask(purchase(1)) for _ in range(200)]
        seconds = time.monotonic() - started
        asked = commandstats()["evalsha"] - before
        while limited_count() < 201:
            await asyncio.sleep(0.05)
        return first, more, asked, seconds

    first, more, asked, seconds = run(app, talk)
    assert first == [200] * 5 + [429]
    assert {reply.status for reply in more} == {429}
    # Its own counting, and one look a second.
    assert asked <= 2 * (seconds + 1)
    waits = [int(reply.headers["retry-after"]) for reply in more]
    assert waits == sorted(waits, reverse=True)
    assert 50 < waits[-1] <= waits[0] <= 60
    assert more[0].headers["ratelimit"] == f'"user";r=0;t={waits[0]}'
    assert limited_count() == 201


def test_a_text_is_turned_away_in_its_one_form(app):
    async def talk(ask):
        first = [(await ask(purchase(user))).status for user in (42, "42") * 3]
        return first, [(await ask(purchase(user))).status for user in ("042", "42", 42, "auth0|42")]

    first, others = run(app, talk)
    assert first == [200] * 5 + [429]
    assert others == [200, 429, 429, 200]


def test_a_process_that_ends_tells_what_it_counted(app):
    async def talk(ask):
        for _ in range(15):
            await ask(purchase(1))

    run(app, talk)
    assert limited_count() == 10


def test_a_known_key_is_still_answered_and_others_are_not_held_up(app):
    async def talk(ask):
        bought = await ask(purchase(1, "Idempotency-Key: k"))
        for _ in range(6):
            refused = await ask(purchase(1))
        again = await ask(purchase(1, "Idempotency-Key: k"))
        new = await ask(purchase(1, "Idempotency-Key: other"))
        return bought, refused, again, new, await ask(purchase(2))

    bought, refused, again, new, other = run(app, talk)
    assert (refused.status, new.status, other.status) == (429, 429, 200)
    assert again.json == bought.json
    assert again.headers["idempotent-replayed"] == "true"


def test_who_waits_as_told_is_let_in(make_app):
    from app.config import RateLimit

    app = make_app(purchase_user_limit=RateLimit(1, 1500))

    async def talk(ask):
        statuses = [(await ask(purchase(1))).status for _ in range(3)]
        refused = await ask(purchase(1))
        await asyncio.sleep(int(refused.headers["retry-after"]))
        return statuses, (await ask(purchase(1))).status

    assert run(app, talk) == ([200, 429, 429], 200)


def test_a_reset_sale_lets_everybody_in_within_a_second(app):
    async def talk(ask):
        for _ in range(7):
            last = await ask(purchase(1))
        stock.client.delete(*KEYS.attempts)
        started = time.monotonic()
        while (await ask(purchase(1))).status == 429:
            await asyncio.sleep(0.02)
        return last.status, time.monotonic() - started

    status, seconds = run(app, talk)
    assert status == 429
    assert seconds < patience(1.5)


def test_products_that_are_not_there_are_counted_together(app):
    async def talk(ask):
        for _ in range(6):
            await ask(purchase(1))
        for product in range(1000, 3500):
            assert (await ask(purchase(1, productId=product))).status == 429
        while int(stock.client.hget(KEYS.refused, "limited") or 0) < 2500:
            await asyncio.sleep(0.05)

    run(app, talk)
    assert stock.client.keys(KEYS.product("[123]???")) == []
    assert int(stock.client.hget(KEYS.refused, "limited")) == 2500
    assert limited_count() == 1


def test_counts_wait_for_a_redis_that_is_away(app, monkeypatch):
    from app.problems import Unavailable

    told = []

    def count(refusals):
        told.append(dict(refusals))
        if len(told) == 1:
            raise Unavailable("away")

    async def talk(ask):
        monkeypatch.setattr(stock.loop_line, "_count", count)
        for _ in range(8):
            await ask(purchase(1))
        while len(told) < 2:
            await asyncio.sleep(0.05)

    run(app, talk)
    assert told[:2] == [{1: 2}, {1: 2}]
