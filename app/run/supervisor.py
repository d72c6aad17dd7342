"""What `make run` ends in: starts the servers, the web and the worker, and keeps them running.

Everything happens in `run_once`, woken by signals (a child's death is one), in a single thread.
"""

import fcntl
import http.client
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from app import telling
from app.config import ROOT, Settings, SettingsError, load_settings, with_secrets
from app.run import serve
from app.run.embedded import EmbeddedError, embedded_servers
from app.run.processes import (
    STOP_SIGNALS,
    Command,
    Kept,
    Program,
    Signals,
    StartError,
    Stopped,
    Watched,
    Worker,
    how_it_ended,
)
from app.run.pulse import Trouble

log = logging.getLogger("app.run")

TICK_SECONDS = 1.0
PROBE_SECONDS = 0.2
READY_WITHIN_SECONDS = 30
STOP_SECONDS = 10
# Replaying the log of a big sale takes minutes; to give up would only begin it again.
SERVER_START_SECONDS = 600


class Supervisor:
    """One run of the whole system on one DATA_DIR."""

    def __init__(self, settings: Settings, tree: Path = ROOT):
        """`tree` holds wsgi.py, worker.py and webhooks.py."""
        self.settings, self.tree = settings, tree
        self.note = tree / ".runs" / str(os.getpid())
        self.signals = Signals()
        self.kept: list[Kept[Program]] = []
        self.web: Program | None = None
        self.worker: Worker | None = None
        self.webhooks: Worker | None = None
        self.started_at = time.monotonic()
        self.ready = self.warned = False

    def run(self) -> None:
        """Start everything, keep it running, and stop it when a signal says so."""
        with _only_run(self.settings.data_dir) as unclean, suppress(Stopped):
            grace = serve.PORT_GRACE_SECONDS if unclean else 0
            self.address = serve.free_address(self.settings, grace, self._pause)
            try:
                self.start()
                while self.run_once():
                    pass
            finally:
                with suppress(OSError):
                    self.note.unlink(missing_ok=True)
                self.stop()

    def start(self) -> None:
        """Start the servers, prepare the data, then launch web and worker."""
        serve.allow_open_files()
        settings = with_secrets(self.settings)
        for name, server in embedded_servers(settings).items():
            new = "" if server.directory.exists() else ", with new files"
            telling.tell(f"Starting {server.name} in {server.directory}{new}")
            self._keep(server)
            server.start(SERVER_START_SECONDS, wait=self._pause)
            url: dict[str, Any] = {name: server.url}
            settings = replace(settings, **url)
        given: dict[str, str | None] = {
            "PYTHONUNBUFFERED": "1",
            "REDIS_URL": settings.redis_url,
            "DATABASE_URL": settings.database_url,
            "SECRET_KEY": settings.secret_key,
            "LOG_FORMAT": settings.log_format,
        }
        environ = dict(os.environ)
        environ |= {name: value for name, value in given.items() if value is not None}
        telling.tell("Preparing the database: migrations, and what a first start needs")
        flask = [sys.executable, "-m", "flask", "--app", "wsgi"]
        self._run_to_end(Command("prepare", [*flask, "prepare"], environ, self.tree))
        telling.tell("Starting the web server, a worker and who sends webhooks")
        self.web = Command("web", [sys.executable, "-m", "app.run.serve"], environ, self.tree)
        self.worker = Worker("worker", [sys.executable, "worker.py"], environ, self.tree)
        self.webhooks = Worker("webhooks", [sys.executable, "webhooks.py"], environ, self.tree)
        for program in (self.worker, self.webhooks, self.web):
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
        if signal.SIGHUP in came and self.web and self.worker and self.web.is_alive():
            log.info("web and worker: new processes take over")
            self.web.send_signal(signal.SIGHUP)
            # These end what they are at first, and are started again as if they had died.
            for worker in (self.worker, self.webhooks):
                if worker:
                    worker.terminate()
                    worker.replaces = ""
        for kept in self.kept:
            kept.check(time.monotonic())
            if isinstance(kept.program, Watched) and kept.restart_at is None:
                _feel(kept.program)
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
            if program.exit_code() != 0:
                raise StartError(f"{program.name} {how_it_ended(program)}: not started")
        finally:
            program.stop()

    def _look_whether_ready(self) -> None:
        host, port = str(self.address[0]), int(self.address[1])
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
            self._tell_ready(f"http://{f'[{host}]' if ':' in host else host}:{port}")
        elif not self.warned and time.monotonic() - self.started_at > READY_WITHIN_SECONDS:
            self.warned = True
            log.warning("Not ready after %d s, still trying: %s", READY_WITHIN_SECONDS, answer)

    def _tell_ready(self, url: str) -> None:
        given = self.settings.admin_password
        where = "as given" if given else f"in {self.settings.data_dir / 'admin_password'}"
        telling.tell(f"Ready: {url}")
        if self.settings.has_shop_page:
            telling.tell(f"Shop:      {url}/shop, to try it as a shopper")
        telling.tell(f"Sign in:   {url}/admin as {self.settings.admin_email}, password {where}")
        # For programs that look for a running system. Without it they have to be told.
        with suppress(OSError):
            self.note.parent.mkdir(exist_ok=True)
            self.note.write_text(json.dumps({"url": url, "data_dir": str(self.settings.data_dir)}))


def _feel(program: Watched) -> None:
    """Kill a program that no longer works, though it lives; it is started again like a dead one."""
    if trouble := program.trouble():
        what = "it" if trouble is Trouble.SILENT else "one of its threads"
        number = program.process and program.process.pid
        log.error("%s %d: %s stands still; it is killed", program.name, number, what)
        program.end_for(trouble)


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


def exit_code_of(run: Callable[[], None]) -> int:
    """Run until told to stop; return the exit code, having told what kept it from running."""
    telling.begin()
    try:
        run()
    except SettingsError as error:
        return telling.fail(error, 2)
    except (StartError, EmbeddedError) as error:
        return telling.fail(error)
    return 0


def main(tree: Path = ROOT) -> int:
    """Run the system from this tree; return the exit code."""

    def run() -> None:
        settings = load_settings()
        telling.configure(settings)
        Supervisor(settings, tree).run()

    return exit_code_of(run)


if __name__ == "__main__":
    sys.exit(main())
