"""What `make run` ends in: starts the servers, the web and the worker, and keeps them running.

Everything happens in `run_once`, woken by signals (a child's death is one), in a single thread.
"""

import fcntl
import http.client
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from app import serve
from app.config import ROOT, Settings, SettingsError, load_settings, with_secrets
from app.embedded import EmbeddedError, Program, embedded_servers

STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM}
TICK_SECONDS = 1.0
PROBE_SECONDS = 0.2
READY_WITHIN_SECONDS = 30
STOP_SECONDS = 10
# Replaying the log of a big sale takes minutes; to give up would only begin it again.
SERVER_START_SECONDS = 600
FIRST_DELAY_SECONDS, LAST_DELAY_SECONDS = 0.2, 5.0
HEALTHY_SECONDS = 10
# A killed run's web server takes a moment to finish its requests and leave the port.
PORT_GRACE_SECONDS = 5


class StartError(RuntimeError):
    """The system can't be started; the message is one line fit for an operator."""


class Stopped(Exception):
    """A stop signal came while starting."""


def say(line: str) -> None:
    """Print a line; a terminal that is gone must not stop the sale."""
    with suppress(OSError):
        print(line, flush=True)


class Command(Program):
    """A program of the project itself."""

    def __init__(self, name: str, argv: Sequence[str], environ: Mapping[str, str], cwd: Path):
        self.name, self.argv, self.environ, self.cwd = name, argv, environ, cwd

    def launch(self) -> None:
        self._spawn(self.argv, self.cwd, env=self.environ)


class Signals:
    """The signals of this process, as something that can be waited for."""

    def __init__(self) -> None:
        self.read_end, write_end = os.pipe()
        os.set_blocking(self.read_end, False)
        os.set_blocking(write_end, False)
        signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        for number in (*STOP_SIGNALS, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(number, lambda *_: None)

    def wait(self, seconds: float) -> set[int]:
        """Return the signals that came, or an empty set after `seconds`."""
        readable, _, _ = select.select([self.read_end], [], [], max(seconds, 0))
        return set(os.read(self.read_end, 4096)) if readable else set()


@dataclass
class Kept:
    """A program and the back-off of its restarts."""

    program: Program
    started_at: float = 0.0
    delay: float = FIRST_DELAY_SECONDS
    restart_at: float | None = None

    def check(self, now: float) -> None:
        """Restart the program when it has died and its delay is over."""
        if self.restart_at is None and not self.program.is_alive():
            end = _how_it_ended(self.program)
            self.program.kill()  # its own children: a web process would keep the port
            if now - self.started_at >= HEALTHY_SECONDS:
                self.delay = FIRST_DELAY_SECONDS
            say(f"{self.program.name} {end}; starting it again in {self.delay:g} s")
            self.restart_at = now + self.delay
            self.delay = min(self.delay * 2, LAST_DELAY_SECONDS)
        if self.restart_at is not None and now >= self.restart_at:
            self.started_at, self.restart_at = now, None
            try:
                self.program.launch()
            except EmbeddedError as error:
                say(f"{error}")


class Supervisor:
    """One run of the whole system on one DATA_DIR."""

    def __init__(self, settings: Settings, tree: Path = ROOT):
        """`tree` holds wsgi.py and worker.py."""
        self.settings, self.tree = settings, tree
        self.signals = Signals()
        self.kept: list[Kept] = []
        self.web: Program | None = None
        self.worker: Program | None = None
        self.started_at = time.monotonic()
        self.ready = self.warned = False

    def run(self) -> None:
        """Start everything, keep it running, and stop it when a signal says so."""
        with _only_run(self.settings.data_dir) as unclean, suppress(Stopped):
            self.address = self._free_address(PORT_GRACE_SECONDS if unclean else 0)
            try:
                self.start()
                while self.run_once():
                    pass
            finally:
                self.stop()

    def start(self) -> None:
        """Start the servers, prepare the data, then launch web and worker."""
        serve.allow_open_files()
        settings = with_secrets(self.settings)
        for name, server in embedded_servers(settings).items():
            self._keep(server)
            server.start(SERVER_START_SECONDS, wait=self._pause)
            settings = replace(settings, **{name: server.url})
        environ = {
            **os.environ,
            "PYTHONUNBUFFERED": "1",
            "REDIS_URL": settings.redis_url,
            "DATABASE_URL": settings.database_url,
            "SECRET_KEY": settings.secret_key,
        }
        flask = [sys.executable, "-m", "flask", "--app", "wsgi"]
        self._run_to_end(Command("prepare", [*flask, "prepare"], environ, self.tree))
        self.web = Command("web", serve.command(self.settings, self.address[0]), environ, self.tree)
        self.worker = Command("worker", [sys.executable, "worker.py"], environ, self.tree)
        for program in (self.worker, self.web):
            self._keep(program)
            program.launch()

    def run_once(self) -> bool:
        """Wait for a signal or something that is due and act on it; False when it is to stop."""
        now = time.monotonic()
        due = [kept.restart_at - now for kept in self.kept if kept.restart_at is not None]
        came = self.signals.wait(min([TICK_SECONDS if self.ready else PROBE_SECONDS, *due]))
        # At a terminal, SIGHUP says that its window was closed.
        if came & STOP_SIGNALS or (signal.SIGHUP in came and sys.stdin and sys.stdin.isatty()):
            return False
        if signal.SIGHUP in came and self.web.is_alive():
            say("web and worker: new processes take over")
            self.web.process.send_signal(signal.SIGHUP)
            self.worker.terminate()  # ends its batch first, and is started again as if it had died
        for kept in self.kept:
            kept.check(time.monotonic())
        if not self.ready:
            self._look_whether_ready()
        return True

    def stop(self) -> None:
        """Stop all in the reverse order of their start; a second Ctrl-C leaves 1 s to each."""
        patience = STOP_SECONDS
        for kept in reversed(self.kept):
            asked_at = time.monotonic()
            kept.program.terminate()
            # An adopted server has no process here, and isn't ours to stop.
            while (
                kept.program.process
                and kept.program.is_alive()
                and (left := asked_at + patience - time.monotonic()) > 0
            ):
                if self.signals.wait(left) & STOP_SIGNALS:
                    patience = 1
            kept.program.kill()

    def _keep(self, program: Program) -> None:
        self.kept.append(Kept(program, started_at=time.monotonic()))

    def _pause(self, seconds: float) -> None:
        if self.signals.wait(seconds) & STOP_SIGNALS:
            raise Stopped

    def _run_to_end(self, program: Program) -> None:
        program.launch()
        try:
            while program.is_alive():
                self._pause(TICK_SECONDS)
            if program.process.returncode != 0:
                raise StartError(f"{program.name} {_how_it_ended(program)}: not started")
        finally:
            program.stop()

    def _free_address(self, grace_seconds: float) -> tuple[str, int]:
        """Return HOST's IP address, which is what Granian wants, and PORT, if it is free."""
        host, port = self.settings.host, self.settings.port
        deadline = time.monotonic() + grace_seconds
        while True:
            try:
                family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
                with socket.socket(family) as probe:
                    # Connections of an earlier run may still be in TIME_WAIT.
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    probe.bind(address)
                return address[0], port
            except OSError as error:
                if time.monotonic() >= deadline:
                    raise StartError(
                        f"can't listen on {host}:{port}: {error.strerror or error}; "
                        "choose another PORT or HOST"
                    ) from None
            self._pause(PROBE_SECONDS)

    def _look_whether_ready(self) -> None:
        host, port = self.address
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104
        connection = http.client.HTTPConnection(host, port, timeout=2)
        try:
            connection.request("GET", "/readyz")
            response = connection.getresponse()
            self.ready = response.status == 200
            answer = f"{response.status} {response.read(300).decode(errors='replace').strip()}"
        except (OSError, http.client.HTTPException) as error:
            answer = f"the web server doesn't answer ({error})"
        finally:
            connection.close()
        if self.ready:
            say(f"Ready: http://{f'[{host}]' if ':' in host else host}:{port}")
        elif not self.warned and time.monotonic() - self.started_at > READY_WITHIN_SECONDS:
            self.warned = True
            say(f"Not ready after {READY_WITHIN_SECONDS} s, still trying: {answer}")


@contextmanager
def _only_run(data_dir: Path) -> Iterator[bool]:
    """Hold DATA_DIR for this run; yield whether the run before was killed."""
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        file = (data_dir / "run.lock").open("a+")
    except OSError as error:
        raise StartError(f"can't use DATA_DIR {data_dir}: {error.strerror}") from None
    with file:
        file.seek(0)
        former = file.read().strip()
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StartError(f"already running on {data_dir} (process {former})") from None
        try:
            file.truncate(0)
            print(os.getpid(), file=file, flush=True)
            yield bool(former)
        finally:
            file.truncate(0)


def _how_it_ended(program: Program) -> str:
    code = program.process.returncode if program.process else None
    if code is None:
        return "is gone"
    if code >= 0:
        return f"ended with exit code {code}"
    return f"was killed by {signal.Signals(-code).name}"


def main(tree: Path = ROOT) -> int:
    """Run until told to stop; return the exit code."""
    try:
        Supervisor(load_settings(), tree).run()
    except SettingsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (StartError, EmbeddedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
