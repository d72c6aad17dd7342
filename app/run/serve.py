"""The web server by itself: `python -m app.run.serve`, as containers and systemd run it.

It owns the listening sockets, one for each of its processes (the kernel spreads connections over
them), and keeps the processes running. A socket outlives its process, and with it the connections
that wait to be accepted: a neighbour answers them, or who comes next. SIGHUP renews the processes
one after the other, SIGTERM lets requests in flight finish. A process whose event loop or page
threads no longer answer is replaced (pulse.py).
"""

import logging
import resource
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from signal import SIGHUP
from typing import Any, ClassVar

from app import telling
from app.config import Settings, SettingsError, load_settings, with_secrets
from app.run import pulse
from app.run.embedded import EmbeddedError, embedded_servers
from app.run.processes import STOP_SIGNALS, Kept, Signals, StartError, Stopped, Watched
from app.run.pulse import Trouble

log = logging.getLogger("app.run")

# One descriptor per open connection; the usual 1024 is too few, and all there are slows forks.
OPEN_FILES = 65536
# Connections that the kernel keeps until they are accepted, for each process.
BACKLOG = 4096
POLL_SECONDS = 0.05
# Importing takes a second; on a busy machine more.
START_SECONDS = 30
# Of a restart, after several: less than a shopper's patience.
LONGEST_DELAY_SECONDS = 1.0
# What a process allows itself to finish its requests, and a little.
STOP_SECONDS = 8
# A killed run's processes take a moment to leave the port.
PORT_GRACE_SECONDS = 5
PORT_POLL_SECONDS = 0.2


# As `socket` has it: (host, port), with two more for IPv6.
Address = tuple[Any, ...]


class WebProcess(Watched):
    """One process at one listening socket."""

    name = "web process"
    causes: ClassVar = {Trouble.SILENT: "event_loop", Trouble.STUCK: "page_threads"}

    def __init__(
        self, listener: socket.socket, neighbour: socket.socket, replaces: str = ""
    ) -> None:
        """`neighbour` is a socket whose process may die or hang: it is looked after meanwhile."""
        self.listener, self.neighbour, self.replaces = listener, neighbour, replaces

    def launch(self) -> None:
        """Start it. Raises StartError when the system has nothing left for it."""
        files = self.listener.fileno(), self.neighbour.fileno()
        try:
            self._spawn_watched([sys.executable, "web.py"], Path.cwd(), files)
        except OSError as error:
            raise StartError(f"a web process can't be started: {error}") from None

    def is_ready(self) -> bool:
        """Tell whether it accepts connections."""
        if self.pulse is None:
            return False
        if not self.pulse.begun:
            self.pulse.feel(time.monotonic())
        return self.pulse.begun


class WebServer:
    """The listening sockets and their processes."""

    def __init__(self, settings: Settings, address: Address) -> None:
        """`address` is an IP address and PORT, which must be free."""
        self.signals = Signals()
        self.to_renew: list[Kept[WebProcess]] = []
        listeners = [_listener(address) for _ in range(settings.web_workers)]
        self.kept = [
            Kept(
                WebProcess(listener, listeners[number - 1]),
                started_at=time.monotonic(),
                longest=LONGEST_DELAY_SECONDS,
            )
            for number, listener in enumerate(listeners)
        ]

    def run(self) -> None:
        """Serve until a stop signal comes."""
        with suppress(Stopped):
            try:
                for kept in self.kept:
                    kept.program.launch()
                while True:
                    self._attend(pulse.BEAT_SECONDS)
                    due, self.to_renew = self.to_renew, []
                    self.renew(due)
            finally:
                self.stop()

    def renew(self, those: list[Kept[WebProcess]]) -> None:
        """Let a successor take over from each of those, or leave all as it is if one can't."""
        for kept in those:
            former = kept.program
            cause = former.causes[Trouble.STUCK] if former.given_up else ""
            successor = WebProcess(former.listener, former.neighbour, cause)
            try:
                successor.launch()
                if not self._await(successor.is_ready, START_SECONDS, successor.is_alive):
                    raise StartError("a new web process does not start")
            except StartError as error:
                log.error("%s; those that serve go on", error)
                successor.kill()
                former.given_up = False
                return
            kept.program = successor
            kept.started_at, kept.restart_at = time.monotonic(), None
            former.terminate()
            self._await(former.has_ended, STOP_SECONDS)
            former.kill()

    def stop(self) -> None:
        """Let every process finish its requests, then end it."""
        for kept in self.kept:
            kept.program.terminate()
        deadline = time.monotonic() + STOP_SECONDS
        while time.monotonic() < deadline and any(kept.program.is_alive() for kept in self.kept):
            self.signals.wait(POLL_SECONDS)
        for kept in self.kept:
            kept.program.kill()

    def _attend(self, seconds: float) -> None:
        """Wait for signals, do what is due. Raises Stopped."""
        now = time.monotonic()
        due = [kept.restart_at - now for kept in self.kept if kept.restart_at is not None]
        came = self.signals.wait(min([seconds, *due]))
        if came & STOP_SIGNALS:
            raise Stopped
        if SIGHUP in came:
            self.to_renew = list(self.kept)
        for kept in self.kept:
            kept.check(time.monotonic())
            if kept.restart_at is None:
                self._feel(kept)

    def _feel(self, kept: Kept[WebProcess]) -> None:
        """Replace a process that no longer answers, though it lives.

        Who serves purchases and no pages is left to do so until its successor is ready.
        """
        web = kept.program
        trouble, number = web.trouble(), web.process and web.process.pid
        if trouble is Trouble.STUCK:
            log.error("web process %d: no page thread answers; it is replaced", number)
            self.to_renew.append(kept)
        elif trouble is Trouble.SILENT:
            log.error("web process %d: the event loop stands still; it is killed", number)
            web.end_for(trouble)

    def _await(
        self,
        condition: Callable[[], bool],
        seconds: float,
        possible: Callable[[], bool] = lambda: True,
    ) -> bool:
        """Wait for a condition, going on with everything else; return whether it came true."""
        deadline = time.monotonic() + seconds
        while not condition():
            if not possible() or time.monotonic() > deadline:
                return condition()
            self._attend(POLL_SECONDS)
        return True


def _listener(address: Address) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    listener.bind(address)
    listener.listen(BACKLOG)
    return listener


def free_address(
    settings: Settings, grace_seconds: float, wait: Callable[[float], object] = time.sleep
) -> Address:
    """Return HOST's IP address and PORT when nobody listens there. Raises StartError."""
    host, port = settings.host, settings.port
    deadline = time.monotonic() + grace_seconds
    while True:
        try:
            family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            with socket.socket(family) as probe:
                # Connections of an earlier run may still be in TIME_WAIT. SO_REUSEPORT must not be
                # set here: two servers would then share the port unnoticed.
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
            return address
        except OSError as error:
            if time.monotonic() >= deadline:
                raise StartError(
                    f"can't listen on {host}:{port}: {error.strerror or error}; "
                    "choose another PORT or HOST"
                ) from None
        wait(PORT_POLL_SECONDS)


def allow_open_files() -> None:
    """Raise this process's limit on open files as far as it may and needs."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, enough), hard))


def main() -> None:
    """Be the web server; the servers behind it must be given."""
    telling.begin()
    try:
        settings = with_secrets(load_settings())
        telling.configure(settings)
        if embedded_servers(settings):
            raise SettingsError("REDIS_URL and DATABASE_URL are needed; `make run` brings its own")
        allow_open_files()
        WebServer(settings, free_address(settings, PORT_GRACE_SECONDS)).run()
    except (SettingsError, EmbeddedError, StartError, OSError) as error:
        sys.exit(telling.fail(error))


if __name__ == "__main__":
    main()
