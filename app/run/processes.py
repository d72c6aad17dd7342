"""Programs that run beside this one, and what it takes to keep them running."""

import logging
import os
import select
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from app.run.leash import leashed
from app.run.pulse import Pulse, Trouble

log = logging.getLogger("app.run")

STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM}
# What a process is told that comes after one which ended by itself.
DIED = "died"
FIRST_DELAY_SECONDS, LAST_DELAY_SECONDS = 0.2, 5.0
HEALTHY_SECONDS = 10


class StartError(RuntimeError):
    """Something can't be started; the message is one line fit for an operator."""


class Stopped(Exception):
    """A stop signal came."""


class Program:
    """A child process with its own process group, which the kernel stops when its parent dies.

    That is the death of the starting *thread* (prctl(2)): launch from the main thread.
    """

    name = "program"
    stop_signal = signal.SIGTERM
    process: subprocess.Popen[bytes] | None = None

    def launch(self) -> None:
        """Start without waiting for readiness."""
        raise NotImplementedError

    def is_alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def has_ended(self) -> bool:
        return not self.is_alive()

    def terminate(self) -> None:
        """Ask for a clean end."""
        self.send_signal(self.stop_signal)

    def send_signal(self, number: int) -> None:
        if self.process and self.process.poll() is None:
            self.process.send_signal(number)

    def exit_code(self) -> int | None:
        """Return it as `Popen.returncode` has it, None while the program runs or is gone."""
        return self.process.returncode if self.process else None

    def kill(self) -> None:
        """End what is left of the process and its group, at once."""
        if self.process is not None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def stop(self, timeout_seconds: float = 10) -> None:
        """End the process that this object started, cleanly if it does so in time."""
        self.terminate()
        if self.process is not None:
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout_seconds)
        self.kill()
        self.process = None

    def _spawn(
        self, argv: Sequence[str], directory: Path, identity: str = "", **options: Any
    ) -> None:
        self.process = subprocess.Popen(
            leashed(argv, self.stop_signal, directory, identity),
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # the terminal's Ctrl-C is for the parent alone
            **options,
        )


class Watched(Program):
    """A program that shows by a pipe of its own whether it works (pulse.py)."""

    # Each trouble's name among the causes of restarts that are counted.
    causes: ClassVar[Mapping[Trouble, str]] = {}
    pulse: Pulse | None = None
    given_up = False
    # What was wrong with the process before this one; the next one is told.
    replaces = ""

    def trouble(self) -> Trouble | None:
        """Return what ails the process, once; from then on it is given up."""
        if self.pulse is None or self.process is None or self.given_up:
            return None
        trouble = self.pulse.feel(time.monotonic())
        self.given_up = trouble is not None
        return trouble

    def end_for(self, trouble: Trouble) -> None:
        """Kill a process that would not hear a signal; the next one counts why."""
        self.replaces = self.causes[trouble]
        self.send_signal(signal.SIGKILL)

    def kill(self) -> None:
        super().kill()
        self._close()

    def _spawn_watched(
        self, argv: Sequence[str], directory: Path, files: Sequence[int] = (), **options: Any
    ) -> None:
        """Start it with these open files, the pipe's end, and `replaces` as further arguments."""
        self._close()
        ours, theirs = os.pipe()
        self.pulse, self.given_up = Pulse(ours, time.monotonic()), False
        try:
            given = *files, theirs
            argv = [*argv, *map(str, given), self.replaces]
            self._spawn(argv, directory, pass_fds=given, **options)
        finally:
            os.close(theirs)
        self.replaces = DIED  # whoever comes after it, if nothing else is known by then

    def _close(self) -> None:
        if self.pulse is not None:
            self.pulse.close()
            self.pulse = None


class Command(Program):
    """A program of the project itself."""

    def __init__(self, name: str, argv: Sequence[str], environ: Mapping[str, str], cwd: Path):
        self.name, self.argv, self.environ, self.cwd = name, argv, environ, cwd

    def launch(self) -> None:
        self._spawn(self.argv, self.cwd, env=self.environ)


class Worker(Command, Watched):
    """A worker process, which says whether its threads get on (app/worker/alive.py)."""

    causes: ClassVar = {Trouble.SILENT: "standstill", Trouble.STUCK: "thread"}

    def launch(self) -> None:
        self._spawn_watched(self.argv, self.cwd, env=self.environ)


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


Started = TypeVar("Started", bound=Program)


@dataclass
class Kept(Generic[Started]):
    """A program and the back-off of its restarts."""

    program: Started
    started_at: float = 0.0
    delay: float = FIRST_DELAY_SECONDS
    restart_at: float | None = None
    longest: float | None = None

    def check(self, now: float) -> None:
        """Restart the program when it has died and its delay is over."""
        if self.restart_at is None and not self.program.is_alive():
            end = how_it_ended(self.program)
            self.program.kill()  # its own children: a web process would keep the port
            if now - self.started_at >= HEALTHY_SECONDS:
                self.delay = FIRST_DELAY_SECONDS
            log.warning("%s %s; starting it again in %g s", self.program.name, end, self.delay)
            self.restart_at = now + self.delay
            self.delay = min(self.delay * 2, self.longest or LAST_DELAY_SECONDS)
        if self.restart_at is not None and now >= self.restart_at:
            self.started_at, self.restart_at = now, None
            try:
                self.program.launch()
            except StartError as error:
                log.error("%s", error)


def how_it_ended(program: Program) -> str:
    """Say it in words that follow the program's name."""
    code = program.exit_code()
    if code is None:
        return "is gone"
    if code >= 0:
        return f"ended with exit code {code}"
    return f"was killed by {signal.Signals(-code).name}"
