"""One process of the web server, on the test's own event loop, and clients that write bytes."""

import asyncio
import json
import os
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, NamedTuple

from waiting import patience

from app.extensions import stock
from app.stock.doorkeeper import Doorkeeper
from app.stock.loop_line import LoopLine
from app.web.server import Server


class Reply(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self):
        return json.loads(self.body)


class Wire:
    """A client's connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def reply(self, head_only: bool = False) -> Reply:
        """Read one reply with a length. Raises IncompleteReadError at the connection's end."""
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        first, *lines = head.rstrip().split("\r\n")
        headers = {n.lower(): v for n, v in (line.split(": ", 1) for line in lines)}
        length = 0 if head_only else int(headers.get("content-length", 0))
        return Reply(int(first.split()[1]), headers, await self.reader.readexactly(length))

    async def is_closed(self) -> bool:
        with suppress(ConnectionError):
            return await self.reader.read(1) == b""
        return True

    def close(self) -> None:
        self.writer.close()


class Process:
    """A serving process: its port and the uvicorn server."""

    def __init__(self, port: int, server: Server) -> None:
        self.port, self.server = port, server
        self.wires: list[Wire] = []

    async def connect(self, source: str = "127.0.0.1") -> Wire:
        streams = await asyncio.open_connection("127.0.0.1", self.port, local_addr=(source, 0))
        self.wires.append(Wire(*streams))
        return self.wires[-1]


@asynccontextmanager
async def serving(app) -> AsyncIterator[Process]:
    """Serve the app on a line of its own: a line to Redis belongs to one event loop."""
    kept = stock.loop_line
    line = LoopLine(stock.first.server, kept.line.script, lambda: None)
    stock.loop_line = Doorkeeper(line, stock.turn_away)
    listener = socket.create_server(("127.0.0.1", 0))
    told, ready = os.pipe()
    process = Process(listener.getsockname()[1], Server(app, ready))
    serving = asyncio.create_task(process.server._serve([listener]))
    try:
        await asyncio.get_running_loop().run_in_executor(None, os.read, told, 1)
        yield process
    finally:
        for wire in process.wires:
            wire.close()
        process.server.should_exit = True
        await serving
        os.close(told)
        stock.loop_line = kept


def ask(app, *requests: bytes) -> list[Reply]:
    """Send requests, each on a connection of its own; return the replies."""

    async def all_of_them() -> list[Reply]:
        async with serving(app) as process:
            replies = []
            for request in requests:
                wire = await process.connect()
                wire.send(request)
                replies.append(await wire.reply())
            return replies

    return asyncio.run(all_of_them())


def purchase(user: int | str, *headers: str, **more: object) -> bytes:
    """Return a request as bytes."""
    body = json.dumps({"userId": user, "productId": 1, **more})
    return post(body.encode(), "Content-Type: application/json", *headers)


def post(body: bytes, *headers: str, length: bool = True) -> bytes:
    lines = ["POST /purchase HTTP/1.1", "Host: a", *headers]
    if length:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


async def until(condition: Callable[[], Any], seconds: float = 10) -> Any:
    """Return what the condition has become, once that is true. Raises AssertionError."""
    deadline = time.monotonic() + patience(seconds)
    while not (found := condition()):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)
    return found
