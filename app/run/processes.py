"""Programs that run beside this one, and what it takes to keep them running.

Run as a script, this file is the child's side of a start: see `_become`.
"""

import ctypes
import os
import select
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM}
FIRST_DELAY_SECONDS, LAST_DELAY_SECONDS = 0.2, 5.0
HEALTHY_SECONDS = 10

NAMESPACE = "namespace"
NOBODY = 65534
CLONE_NEWUSER = 0x10000000
PR_SET_PDEATHSIG = 1


class StartError(RuntimeError):
    """Something can't be started; the message is one line fit for an operator."""


class Stopped(Exception):
    """A stop signal came."""


def say(line: str) -> None:
    """Print a line; a terminal that is gone must not stop the sale."""
    with suppress(OSError):
        print(line, flush=True)


class Program:
    """A child process with its own process group, which the kernel stops when its parent dies.

    That is the death of the starting *thread* (prctl(2)): launch from the main thread.
    """

    name = "program"
    stop_signal = signal.SIGTERM
    process: subprocess.Popen | None = None

    def launch(self) -> None:
        """Start without waiting for readiness."""
        raise NotImplementedError

    def is_alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def terminate(self) -> None:
        """Ask for a clean end."""
        if self.process and self.process.poll() is None:
            self.process.send_signal(self.stop_signal)

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

    def _spawn(self, argv: Sequence[str], directory: Path, identity: str = "", **options) -> None:
        self.process = subprocess.Popen(
            leashed(argv, self.stop_signal, directory, identity),
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # the terminal's Ctrl-C is for the parent alone
            **options,
        )


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
    longest: float | None = None

    def check(self, now: float) -> None:
        """Restart the program when it has died and its delay is over."""
        if self.restart_at is None and not self.program.is_alive():
            end = how_it_ended(self.program)
            self.program.kill()  # its own children: a web process would keep the port
            if now - self.started_at >= HEALTHY_SECONDS:
                self.delay = FIRST_DELAY_SECONDS
            say(f"{self.program.name} {end}; starting it again in {self.delay:g} s")
            self.restart_at = now + self.delay
            self.delay = min(self.delay * 2, self.longest or LAST_DELAY_SECONDS)
        if self.restart_at is not None and now >= self.restart_at:
            self.started_at, self.restart_at = now, None
            try:
                self.program.launch()
            except StartError as error:
                say(f"{error}")


def how_it_ended(program: Program) -> str:
    """Say it in words that follow the program's name."""
    code = program.process.returncode if program.process else None
    if code is None:
        return "is gone"
    if code >= 0:
        return f"ended with exit code {code}"
    return f"was killed by {signal.Signals(-code).name}"


def leashed(
    argv: Sequence[str], death: signal.Signals, directory: Path, identity: str = ""
) -> list[str]:
    """Return the command that runs `argv` in `directory`, and gets `death` when we die."""
    # -I -S: neither packages nor the environment matter, and it takes 20 ms.
    python = [sys.executable, "-I", "-S", __file__]
    return [*python, str(os.getpid()), str(int(death)), identity, str(directory), *argv]


def _become(parent: str, death: str, identity: str, directory: str, *argv: str) -> None:
    """Turn this process into `argv`, as another user if need be, tied to the parent's life.

    A preexec_fn would do the same, but isn't safe in a process with threads.
    """
    if identity == NAMESPACE:
        if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWUSER) != 0:
            raise OSError(ctypes.get_errno(), "no user namespace")
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{NOBODY} 0 1")
        Path("/proc/self/gid_map").write_text(f"{NOBODY} 0 1")
    elif identity:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    if sys.platform == "linux":
        # Only now, since a change of identity clears it; and the parent may be gone already.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(death), 0, 0, 0)
        if os.getppid() != int(parent):
            raise ProcessLookupError("the parent is gone")
    os.chdir(directory)
    os.execv(argv[0], argv)  # noqa: S606


if __name__ == "__main__":
    try:
        _become(*sys.argv[1:])
    except OSError as failure:
        sys.exit(f"error: {failure}")
