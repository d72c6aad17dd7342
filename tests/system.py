"""The whole system as `make run` starts it, and programs beside it: none outlives its test."""

import http.client
import json
import os
import signal
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from client import free_port, sign_in
from waiting import patience, wait_until

from app.config import ROOT
from app.run.processes import leashed

# Ends what the files of a group share, see order.py.
SHARED = pytest.StashKey[ExitStack]()
# For tests that buy more than shoppers may.
UNLIMITED = {"PURCHASE_USER_LIMIT": "off", "PURCHASE_ADDRESS_LIMIT": "off"}
# What a run must not inherit from whoever started the tests.
OF_A_RUN = ("REDIS_URL", "DATABASE_URL", "SECRET_KEY")

# What production asks of the settings besides the servers' addresses.
PRODUCTION = {
    "APP_ENV": "production",
    "SECRET_KEY": "0123456789abcdef0123456789abcdef",
    "ADMIN_EMAIL": "admin@shop.example",
    "ADMIN_PASSWORD": "correct horse battery staple",
    "ADMIN_API_TOKEN": "fst_0123456789abcdef0123456789abcdef",
    "METRICS_TOKEN": "0123456789abcdef0123456789abcdef",
    "TRUSTED_PROXIES": "1",
    "WEB_WORKERS": "2",
    "LOG_FORMAT": "json",
}


def spawn(argv: Sequence[object], directory: Path = ROOT, **options) -> subprocess.Popen:
    """Start a program that gets SIGTERM when the tests die. Call it in the main thread only."""
    words = [str(word) for word in argv]
    words = leashed(words, signal.SIGTERM, directory)
    return subprocess.Popen(words, start_new_session=True, **options)


def processes(data_dir: Path, *words: str) -> list[int]:
    """Return the ids of a system's processes whose command line has all the words.

    The servers, which write their titles over their environment, are known by their directory.
    """
    found, mark = [], os.fsencode(f"DATA_DIR={data_dir}")
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            ours = mark in (entry / "environ").read_bytes().split(b"\0")
            ours = ours or os.readlink(entry / "cwd").startswith(f"{data_dir}/")
            line = (entry / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if ours and line and all(word in line for word in words):
            found.append(int(entry.name))
    return sorted(found)


def end(process: subprocess.Popen, data_dir: Path | None = None) -> None:
    """End a program and all that it started, at once, whatever state they are in.

    `data_dir` finds those of its processes that it no longer holds because it has been killed.
    """
    with suppress(psutil.NoSuchProcess):
        # Stopped first, so that it starts nothing anew meanwhile.
        process.send_signal(signal.SIGSTOP)
        for one in psutil.Process(process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                one.kill()
    process.kill()
    process.wait()

    def is_gone() -> bool:
        for number in (left := processes(data_dir)):
            with suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        return not left

    if data_dir:
        wait_until(is_gone, what=f"the end of all processes of {data_dir}")


@dataclass
class Server:
    """A running system, and how to talk to it."""

    url: str
    api_token: str
    admin_password: str
    data_dir: Path
    process: subprocess.Popen

    def call(
        self, method: str, path: str, body: object = None, **headers: str
    ) -> tuple[int, dict[str, str], bytes, float]:
        """Send a request; return status, headers by lower-case name, content, seconds."""
        url = urllib.parse.urlsplit(self.url)
        connection = http.client.HTTPConnection(url.hostname, url.port, timeout=patience(30))
        started = time.monotonic()
        if body is not None:
            headers |= {"Content-Type": "application/json"}
            body = json.dumps(body)
        try:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            content = response.read()
        finally:
            connection.close()
        names = {name.lower(): value for name, value in response.getheaders()}
        return response.status, names, content, time.monotonic() - started

    def sign_in(self) -> str:
        """Sign the first admin in as a browser does; return the Cookie header."""
        return sign_in(self.url, self.admin_password)


def start_system(
    data_dir: Path, program: str = "supervisor", directory: Path = ROOT, **environ: str
) -> Server:
    """Start the whole system on a free port and wait until it says that it is ready.

    `program` is supervisor, or cluster, which keeps its files in a directory below; `directory`
    is where the code is.
    """
    clean = {name: value for name, value in os.environ.items() if name not in OF_A_RUN}
    port = free_port()
    log = data_dir / "supervisor.log"
    with log.open("w") as output:
        process = spawn(
            [sys.executable, "-m", f"app.run.{program}"],
            directory,
            env=clean | {"DATA_DIR": str(data_dir), "PORT": str(port), **environ},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        wait_until(
            lambda: "Ready:" in log.read_text() or process.poll() is not None,
            60,
            "the system to start",
        )
        if process.poll() is not None:
            pytest.fail(f"the system did not start: {log.read_text()}")
    except BaseException:
        end(process, data_dir)
        raise
    files = data_dir if program == "supervisor" else data_dir / program
    return Server(
        url=f"http://127.0.0.1:{port}",
        api_token=(files / "admin_api_token").read_text().strip(),
        admin_password=(files / "admin_password").read_text().strip(),
        data_dir=files,
        process=process,
    )


def stop_system(server: Server) -> None:
    """Stop it as an operator does; what has not ended in time is ended, and fails the test."""
    try:
        server.process.send_signal(signal.SIGTERM)
        server.process.wait(patience(40))
    finally:
        end(server.process, server.data_dir)


def run_program(
    argv: Sequence[object], seconds: float, directory: Path = ROOT, **environ: str
) -> subprocess.CompletedProcess:
    """Run one of our programs to its end; return what it printed. Fails past its time."""
    return subprocess.run(
        [str(word) for word in argv],
        cwd=directory,
        env=os.environ | environ,
        capture_output=True,
        text=True,
        timeout=patience(seconds),
        check=False,
    )
