"""One process of the web server: web.py, started by run/serve.py at a listening socket.

uvicorn owns the process: its event loop, its signals, its end. What is spoken on a connection is
protocol.py's; purchases go from there to the lane, everything else through pages.py to Flask.
"""

import asyncio
import logging
import resource
import socket
from contextlib import suppress
from email.utils import formatdate

import uvicorn
from flask import Flask

from ..extensions import stock
from ..run import serve
from ..run.collector import spare_what_is_loaded
from .alive import Heartbeat
from .pages import Pages
from .protocol import MAX_CONNECTIONS, Connection, State

# Files that are no connections: listening socket, servers, logs, modules.
SPARE_FILES = 200

# Of uvicorn's main loop.
TICKS_PER_SECOND = 10
HELPED_PER_TICK = 1000

# What a request in flight may still take when its process is to end.
STOP_SECONDS = 5


class Server(uvicorn.Server):
    """Serves until SIGTERM, then finishes what is in flight."""

    server_state: State

    def __init__(self, app: Flask, pulse: int, neighbour: socket.socket | None = None) -> None:
        """`pulse` is a pipe that is written to as long as this process works, see alive.py.

        What waits at the `neighbour`, a listening socket, is accepted too when its own process
        does not do so.
        """
        self.lane, self.pages = app.extensions["lane"], Pages(app)
        super().__init__(_config(self.pages))
        self.config.load()
        # In the place of uvicorn's own, which would speak ASGI.
        self.config.http_protocol_class = self._connection  # type: ignore[assignment]  # a maker
        self.neighbour = neighbour
        self.heartbeat = Heartbeat(pulse, self.pages.check, lambda: self.pages.taken)
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.server_state = State(min(MAX_CONNECTIONS, files - SPARE_FILES))

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.heartbeat.start()

    async def on_tick(self, counter: int) -> bool:
        ends = await super().on_tick(counter)
        await self._help_neighbour()
        if counter % TICKS_PER_SECOND == 0:
            state, now = self.server_state, asyncio.get_running_loop().time()
            state.date = b"Date: %b\r\n" % formatdate(usegmt=True).encode()
            for connection in [each for each in state.connections if each.due < now]:
                connection.expire()
        return ends

    async def _help_neighbour(self) -> None:
        # A process that is alive accepts at once: who still waits here, waits for a dead one.
        loop = asyncio.get_running_loop()
        if self.neighbour is None:
            return
        for _ in range(HELPED_PER_TICK):
            try:
                connection, _ = self.neighbour.accept()
            except OSError:
                return
            with suppress(OSError):
                await loop.connect_accepted_socket(self._connection, connection)

    def _connection(self, **_: object) -> Connection:
        return Connection(self.lane, self.pages, self.server_state, asyncio.get_running_loop())

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.server_state.ending = True
        self.pages.parking.end()
        await super().shutdown(sockets)
        await stock.loop_line.report()


def _config(pages: Pages) -> uvicorn.Config:
    return uvicorn.Config(
        pages,  # type: ignore[arg-type]  # uvicorn wants an application, and never calls it
        loop="uvloop",
        interface="asgi3",
        lifespan="off",
        ws="none",
        log_config=None,
        backlog=serve.BACKLOG,
        timeout_graceful_shutdown=STOP_SECONDS,
    )


def run(app: Flask, listener: int, neighbour: int, pulse: int) -> None:
    """Serve the app at a listening socket; the numbers are file descriptors, see `Server`."""
    spare_what_is_loaded()
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    beside = None if neighbour == listener else socket.socket(fileno=neighbour)
    if beside:
        beside.setblocking(False)
    Server(app, pulse, beside).run([socket.socket(fileno=listener)])
