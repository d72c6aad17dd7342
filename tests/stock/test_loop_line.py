"""The event loop's line to Redis: one connection, any number of claims, no claim sent twice."""

import asyncio
import os
import signal
import socket
import time
from collections import Counter
from dataclasses import replace

import pytest
import redis
import uvloop
from waiting import patience

from app.config import NO_LIMIT
from app.extensions import stock
from app.problems import Unavailable
from app.run.embedded import RedisServer
from app.stock.claims import ClaimScript, Request
from app.stock.gateway import Stock
from app.stock.loop_line import LoopLine
from app.stock.servers import COMMAND_TIMEOUT_SECONDS, Server


@pytest.fixture
def line(app):
    """A line of its own: a line belongs to one event loop."""
    return LoopLine(stock.first.server, stock.loop_line.line.script, lambda: None)


def test_hundreds_in_flight_share_a_connection_and_stay_exact(line):
    async def rush():
        claims = [line.claim(Request(user, 1, 1, None, "a")) for user in range(1, 301)]
        return await asyncio.gather(*claims)

    connections = stock.client.info("stats")["total_connections_received"]
    claims = asyncio.run(rush())
    assert Counter(claim.outcome for claim in claims) == {b"accepted": 100, b"sold_out": 200}
    sold = [claim.detail for claim in claims if claim.outcome == b"accepted"]
    assert sold == list(range(1, 101))
    assert stock.client.info("stats")["total_connections_received"] == connections + 1


def test_a_flushed_script_is_loaded_again(line):
    async def claims():
        first = await line.claim(Request(1, 1, 1, None, "a"))
        stock.client.script_flush()
        return first, await line.claim(Request(2, 1, 1, None, "a"))

    assert [claim.outcome for claim in asyncio.run(claims())] == [b"accepted"] * 2
    assert stock.waiting() == 2


def test_a_redis_without_memory_surely_sells_nothing(line):
    def claim(user: int):
        return line.claim(Request(user, 1, 1, None, "a"))

    async def claims():
        stock.client.config_set("maxmemory", "1mb")
        told = await asyncio.gather(*map(claim, range(1, 11)), return_exceptions=True)
        with pytest.raises(Unavailable) as refused:
            stock.claim(1, 1, 1, None, "a")
        stock.client.config_set("maxmemory", 0)
        return [*told, refused.value], await claim(1)

    try:
        told, after = asyncio.run(asyncio.wait_for(claims(), patience(30)))
    finally:
        stock.client.config_set("maxmemory", 0)
    assert {(type(error), error.executed) for error in told} == {(Unavailable, False)}
    assert after.outcome == b"accepted"
    assert stock.view([1]).products[1]["free"] == 99


def test_a_cut_connection_is_an_unknown_outcome_and_not_sent_again(line):
    async def claims():
        await line.claim(Request(1, 1, 1, None, "a"))
        pending = asyncio.ensure_future(line.claim(Request(2, 1, 1, "k", "a")))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        line._channel.abort()
        with pytest.raises(Unavailable):
            await pending
        return await line.claim(Request(3, 1, 1, None, "a"))

    assert asyncio.run(claims()).outcome == b"accepted"
    assert stock.view([1]).products[1]["accepted"] <= 3


def test_a_redis_that_hangs_is_given_up_on_and_found_again(line, servers):
    pid = servers[0].process.pid

    async def claims():
        await line.claim(Request(1, 1, 1, None, "a"))
        os.kill(pid, signal.SIGSTOP)
        try:
            started = time.monotonic()
            tries = [line.claim(Request(user, 1, 1, None, "a")) for user in range(2, 66)]
            failed = await asyncio.gather(*tries, return_exceptions=True)
            waited = time.monotonic() - started
            # The next ones connect, wait for an answer, and then fail at once for a while.
            started = time.monotonic()
            tries = [line.claim(Request(user, 1, 1, None, "a")) for user in range(66, 130)]
            failed += await asyncio.gather(*tries, return_exceptions=True)
            waited_again = time.monotonic() - started
        finally:
            os.kill(pid, signal.SIGCONT)
        assert all(isinstance(error, Unavailable) for error in failed)
        assert max(waited, waited_again) < patience(2)
        deadline = time.monotonic() + patience(2)
        while True:
            try:
                return await line.claim(Request(200, 1, 1, None, "a"))
            except Unavailable:
                assert time.monotonic() < deadline
                await asyncio.sleep(0.05)

    assert asyncio.run(claims()).outcome == b"accepted"


def test_what_redis_answered_while_this_process_stood_still_is_heard(line):
    """Stopped, or without a CPU: what came meanwhile is read after timers that are long due."""

    class Stalling(asyncio.Protocol):
        """A client whose request is served as such are: where it was read."""

        def data_received(self, data: bytes) -> None:
            line.ask(Request(2, 1, 1, None, "a"), told.set_result)
            line._send()
            time.sleep(COMMAND_TIMEOUT_SECONDS + 0.2)

    async def whole():
        nonlocal told
        loop = asyncio.get_running_loop()
        told = loop.create_future()
        await line.claim(Request(1, 1, 1, None, "a"))
        ours, clients = socket.socketpair()
        transport, _ = await loop.create_connection(Stalling, sock=ours)
        clients.send(b"x")
        claim = await told
        transport.close()
        clients.close()
        return claim

    told = None
    assert uvloop.run(whole()).detail == 2


def test_no_redis_at_all(app, tmp_path):
    script = ClaimScript("return 1", app.config["SETTINGS"])

    async def claims():
        line = LoopLine(Server(f"unix://{tmp_path}/nothing.sock"), script, lambda: None)
        tries = [line.claim(Request(user, 1, 1, None, "a")) for user in range(20)]
        return await asyncio.gather(*tries, return_exceptions=True)

    assert all(isinstance(error, Unavailable) for error in asyncio.run(claims()))


def test_another_sale_in_redis_sells_nothing(app):
    async def claim():
        line = LoopLine(stock.first.server, stock.loop_line.line.script, lambda: ("another", 5))
        with pytest.raises(Unavailable):
            await line.claim(Request(1, 1, 1, None, "a"))

    asyncio.run(claim())
    assert stock.waiting() == 0


def test_redis_is_found_again_before_anybody_asks(line):
    async def claims():
        await line.claim(Request(1, 1, 1, None, "a"))
        lost = line._channel
        lost.abort()
        while line._channel is lost:
            await asyncio.sleep(0.02)
        return await line.claim(Request(2, 1, 1, None, "a"))

    assert asyncio.run(asyncio.wait_for(claims(), patience(10))).outcome == b"accepted"


@pytest.fixture
def locked_redis(tmp_path):
    """A Redis with a password, and its address with a database that is not the first."""
    server = RedisServer(tmp_path)
    server.start()
    client = redis.Redis.from_url(server.url)
    client.config_set("requirepass", "pass word")
    yield server.url.replace("unix://", "unix://:pass%20word@") + "?db=3"
    server.stop()


def stock_at(url, settings) -> Stock:
    own = Stock()
    own.init_app(replace(settings, redis_url=url, purchase_user_limit=NO_LIMIT))
    return own


@pytest.mark.parametrize("road", ["loop", "thread"])
def test_a_password_and_a_database(locked_redis, settings, road):
    url = locked_redis
    own = stock_at(url, settings)
    own.first.open("test", 1)
    terms = {
        "opens": None,
        "closes": None,
        "pause": 0,
        "cap": None,
        "max": 10,
        "price": "1 USD",
        "hold": None,
    }
    own.put_product(1, 1, terms)
    own.move("test", 1, 1, 5)
    request = Request(1, 1, 1, None, "a")
    if road == "loop":
        claim = asyncio.run(own.loop_line.line.claim(request))
    else:
        claim = own.thread_line.claim(request)
    assert claim.outcome == b"accepted"
    held = redis.Redis.from_url(url, decode_responses=True).info("keyspace")
    assert list(held) == ["db3"]
    # The wrong password, and none: nobody was asked, so surely nothing happened.
    for wrong in (url.replace("pass%20word", "guess"), url.replace(":pass%20word@", "")):
        own = stock_at(wrong, settings)
        line = own.thread_line if road == "thread" else own.loop_line.line
        with pytest.raises(Unavailable) as refused:
            asyncio.run(line.claim(request)) if road == "loop" else line.claim(request)
        assert refused.value.executed is False
