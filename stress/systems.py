"""The systems that bench.py compares, each started in a scratch directory, and what measures them.

Ours, the usual design in Node.js, the strongest usual alternative in Go, and the ceiling of a web
server. One at a time; load is wrk's, on loopback only.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "stress")]

import redis
from client import Server, fresh_addresses

from app.run.embedded import PostgresServer, RedisServer

CONNECTIONS = 64
STOCK = 10_000_000
EXPRESS = ROOT / "stress" / "peer_express"
GO = ROOT / "stress" / "peer_go"
# Debian's golang-github-gomodule-redigo-dev; nothing is fetched.
GO_PATH = "/usr/share/gocode"
TICKS = os.sysconf("SC_CLK_TCK")
# The roles of processes, by a word of their command lines.
ROLES = {
    "app.run.serve": "web",
    "web.py": "web",
    "server.js": "web",
    "peer_go": "web",
    "worker.py": "worker",
    "worker.js": "worker",
    "valkey": "redis",
    "postgres": "postgres",
}


class Broken(Exception):
    """The figures of a run don't agree, so it does not count."""


def until(condition, seconds: float, what: str):
    """Return the condition's first true value. Raises Broken when the time is over."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise Broken(f"waited {seconds:.0f} s for {what}")
        time.sleep(0.02)
    return value


def wrk(
    script: str, url: str, *args: object, seconds: float, connections: int = CONNECTIONS
) -> dict:
    """Return wrk's figures for one load; rates are per second."""
    threads = min(2, connections)
    command = ["wrk", f"-t{threads}", f"-c{connections}", f"-d{max(1, round(seconds))}s", "-s"]
    command += [str(ROOT / "stress" / "load" / script), url, "--", *map(str, args)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    figures = json.loads(output.strip().splitlines()[-1])
    figures["rate"] = figures["requests"] / (figures["duration_us"] / 1e6)
    return figures


def cpu_seconds(roots: list[int]) -> dict[str, float]:
    """Return the CPU time of these processes and all below them, by role."""
    parents, times, roles = {}, {}, {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            words = (entry / "cmdline").read_bytes().decode(errors="replace")
            words += (entry / "comm").read_text()
        except OSError:
            continue
        pid = int(entry.name)
        parents[pid], times[pid] = int(fields[1]), (int(fields[11]) + int(fields[12])) / TICKS
        roles[pid] = next((role for word, role in ROLES.items() if word in words), "other")
    sums: dict[str, float] = {}
    for pid, role in roles.items():
        ancestor = pid
        while ancestor not in roots and ancestor in parents:
            ancestor = parents[ancestor]
        if ancestor in roots:
            sums[role] = sums.get(role, 0) + times[pid]
    return sums


def per_order(before: dict[str, float], after: dict[str, float], orders: int) -> dict[str, float]:
    """Return microseconds of CPU per order, by role."""
    return {
        role: (after[role] - before.get(role, 0)) / orders * 1e6
        for role in ("web", "redis", "worker", "postgres")
        if role in after
    }


class Users:
    """Ranges of user ids that no run has used."""

    def __init__(self) -> None:
        self._base = 0

    def next(self) -> int:
        self._base += 10**9
        return self._base


class Ours:
    """The system as `make run` starts it."""

    name = "this system"

    def __init__(self, folder: Path, port: int, **environ: str) -> None:
        self.folder, self.port = folder, port
        self.url = f"http://127.0.0.1:{port}"
        self.environ = {
            name: value
            for name, value in os.environ.items()
            if name not in ("REDIS_URL", "DATABASE_URL", "SECRET_KEY", "APP_ENV")
        } | {
            "DATA_DIR": str(folder),
            "PORT": str(port),
            # All load comes from one address; and the peer limits users alone.
            "PURCHASE_ADDRESS_LIMIT": "off",
            **environ,
        }

    @contextmanager
    def running(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        log = self.folder / "bench.log"
        with log.open("w") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "app.run.supervisor"],
                cwd=ROOT,
                env=self.environ,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self.roots = [process.pid]
        try:
            started = time.monotonic()
            until(
                lambda: "Ready:" in log.read_text() or process.poll() is not None, 90, "the start"
            )
            self.start_seconds = time.monotonic() - started
            if process.poll() is not None:
                raise Broken(f"did not start:\n{log.read_text()}")
            self.api = Server(self.url, (self.folder / "admin_api_token").read_text().strip())
            yield self
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)

    def product(self, stock: int) -> int:
        body = {"name": "bench", "priceCents": 1999, "currency": "EUR", "stock": stock}
        admin = {"Authorization": f"Bearer {self.api.token}"}
        return self.api.call("POST", "/products", body, **admin).body["id"]

    def metrics(self, product: int) -> dict:
        # From an address of its own each time: look-ups are limited to 600 a minute for each.
        return self.api.read(f"/purchase/metrics?productId={product}", fresh_addresses(1)[0])

    def pid_of(self, role: str) -> int:
        word = next(word for word, known in ROLES.items() if known == role)
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    words = (entry / "cmdline").read_bytes().decode(errors="replace")
                    environ = (entry / "environ").read_bytes().decode(errors="replace")
                except OSError:
                    continue
                if word in words and f"DATA_DIR={self.folder}\0" in environ:
                    return int(entry.name)
        raise Broken(f"no process for {role}")


class ExpressPeer:
    """Express 5, ioredis, BullMQ, pg: the usual design, without fsync in its Redis."""

    def __init__(self, folder: Path, port: int, processes: int) -> None:
        self.name = f"peer, {processes} process{'es' if processes > 1 else ''}"
        self.folder, self.port, self.processes = folder, port, processes
        self.url = f"http://127.0.0.1:{port}"

    @contextmanager
    def running(self, stock: int):
        self.folder.mkdir(parents=True, exist_ok=True)
        servers = (
            RedisServer(self.folder, extra=("appendonly=no", "appendfsync=no")),
            PostgresServer(self.folder),
        )
        children = []
        for server in servers:
            server.start()
        try:
            redis.Redis.from_url(servers[0].url).flushall()
            environ = os.environ | {
                "NODE_ENV": "production",
                "REDIS_URL": servers[0].url.partition("?")[0],
                "DATABASE_URL": servers[1].url.replace("+psycopg2", ""),
                "PORT": str(self.port),
                "PROCESSES": str(self.processes),
                "STOCK": str(stock),
            }
            with (self.folder / "peer.log").open("a") as log:
                options = {"cwd": EXPRESS, "env": environ, "stdout": log, "stderr": log}
                subprocess.run(["node", "seed.js"], check=True, **options)
                for program in ("server.js", "worker.js"):
                    children.append(subprocess.Popen(["node", program], **options))
            self.roots = [child.pid for child in children] + [
                server.process.pid for server in servers
            ]
            until(self._answers, 30, "the peer")
            yield self
        finally:
            for child in children:
                child.terminate()
            for child in children:
                child.wait(30)
            for server in servers:
                server.stop()

    def _answers(self) -> bool:
        try:
            return "queue_depth" in self.metrics(1)
        except OSError:
            return False

    def metrics(self, product: int) -> dict:
        with urllib.request.urlopen(f"{self.url}/purchase/metrics", timeout=10) as answer:
            return json.load(answer)


class GoPeer:
    """net/http, redigo, one fused script: what is sold is in its Redis alone, with fsync or not."""

    def __init__(self, folder: Path, port: int, fsync: bool) -> None:
        self.name = f"Go peer, {'fsync' if fsync else 'no fsync'}"
        self.folder, self.port, self.fsync = folder, port, fsync
        self.url = f"http://127.0.0.1:{port}"

    @contextmanager
    def running(self, stock: int):
        self.folder.mkdir(parents=True, exist_ok=True)
        program = self.folder / "peer_go"
        if not program.exists():
            environ = os.environ | {"GO111MODULE": "off", "GOPATH": GO_PATH}
            subprocess.run(["go", "build", "-o", program, "."], cwd=GO, env=environ, check=True)
        weak = () if self.fsync else ("appendonly=no", "appendfsync=no")
        server = RedisServer(self.folder, extra=weak)
        server.start()
        try:
            redis.Redis.from_url(server.url).flushall()
            environ = os.environ | {
                "REDIS_URL": server.url.partition("?")[0],
                "PORT": str(self.port),
                "STOCK": str(stock),
            }
            with (self.folder / "peer.log").open("a") as log:
                peer = subprocess.Popen([program], env=environ, stdout=log, stderr=log)
            try:
                self.roots = [peer.pid, server.process.pid]
                until(lambda: _listens(self.port), 30, "the Go peer")
                yield self
            finally:
                peer.terminate()
                peer.wait(30)
        finally:
            server.stop()

    def metrics(self, product: int) -> dict:
        url = f"{self.url}/purchase/metrics?productId={product}"
        with urllib.request.urlopen(url, timeout=10) as answer:
            return json.load(answer)


def has_go() -> bool:
    """Tell whether the Go peer can be built here."""
    return bool(shutil.which("go")) and (Path(GO_PATH) / "src/github.com/gomodule/redigo").exists()


@contextmanager
def noop(port: int):
    """The ceiling: Granian with the smallest application there is."""
    command = ["granian", "--interface", "wsgi", "--port", str(port), "--workers", "2"]
    command += ["--blocking-threads", "2", "--no-ws", "--log-level", "error", "noop_wsgi:app"]
    process = subprocess.Popen(
        [sys.executable, "-m", *command], cwd=ROOT / "stress", stdout=subprocess.DEVNULL
    )
    try:
        until(lambda: _listens(port), 20, "the no-op server")
        yield f"http://127.0.0.1:{port}/purchase"
    finally:
        process.terminate()
        process.wait(20)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
