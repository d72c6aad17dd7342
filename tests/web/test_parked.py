"""Polls of the feed that wait: how many may, and what ends them."""

import asyncio

import pytest
from waiting import patience

from app.extensions import stock
from app.problems import Unavailable
from app.web import parked
from app.web.parked import Parking, Wait
from app.web.request import Request

FOR_LONG = 3600.0


@pytest.fixture
def head(app, monkeypatch):
    """What Redis says of the feed's end; an exception is raised."""
    told = [("sale", 7)]

    def ask():
        if isinstance(told[0], Exception):
            raise told[0]
        return told[0]

    monkeypatch.setattr(stock.board, "feed_head", ask)
    return told


def run(talk) -> None:
    asyncio.run(asyncio.wait_for(talk(Parking()), patience(20)))


def wait(parking: Parking, seconds: float = FOR_LONG) -> tuple[Request, asyncio.Task]:
    request = Request({})
    return request, asyncio.create_task(parking.park(Wait("sale", 7, seconds), request))


async def until_parked(parking: Parking, count: int) -> None:
    while len(parking) != count:
        await asyncio.sleep(0.01)


def test_no_more_wait_than_there_is_room_for(head, monkeypatch):
    monkeypatch.setattr(parked, "MOST_PARKED", 2)

    async def talk(parking):
        waiting = [wait(parking)[1] for _ in range(2)]
        await until_parked(parking, 2)
        assert await wait(parking)[1] is False
        head[0] = ("sale", 8)
        assert await asyncio.gather(*waiting) == [True, True]
        assert len(parking) == 0
        # Whoever comes later is looked after again.
        head[0] = ("sale", 7)
        _, later = wait(parking)
        await until_parked(parking, 1)
        head[0] = ("another sale", 1)
        assert await later

    run(talk)


def test_the_end_of_the_process_ends_all(head):
    async def talk(parking):
        _, waiting = wait(parking)
        await until_parked(parking, 1)
        parking.end()
        assert await waiting
        assert await wait(parking)[1]

    run(talk)


def test_a_client_that_is_gone_is_not_waited_for(head):
    async def talk(parking):
        request, waiting = wait(parking)
        _, other = wait(parking)
        await until_parked(parking, 2)
        request.gone = True
        assert await waiting
        assert len(parking) == 1
        parking.end()
        assert await other

    run(talk)


@pytest.mark.parametrize("error", [Unavailable("Redis is away"), RuntimeError("rubbish")])
def test_without_redis_postgresql_is_asked_when_the_time_is_up(head, error):
    head[0] = error

    async def talk(parking):
        assert await wait(parking, seconds=0.3)[1]

    run(talk)
