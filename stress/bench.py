"""Measure the system, the web server's ceiling, and a peer of the usual design, in one run.

    python stress/bench.py [--rounds 3] [--seconds 8] [--no-peer] [--quick]

Starts everything itself in a scratch directory, one system at a time and in turn, so that a change
of the machine's speed hits all of them. Load comes from wrk, on loopback only. A run counts only
when what was sold, stored and taken from the stock agree. Writes the tables and the plot into
docs/performance.md (--quick writes nothing).
"""

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "stress")]

import redis
from bench_report import write_report
from client import Server, fresh_addresses, sign_in

from app.run.embedded import PostgresServer, RedisServer

CONNECTIONS = 64
STOCK = 10_000_000
PEER = ROOT / "stress" / "peer_express"
TICKS = os.sysconf("SC_CLK_TCK")
# The roles of processes, by a word of their command lines.
ROLES = {
    "app.run.serve": "web",
    "web.py": "web",
    "server.js": "web",
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
            self.redis = redis.Redis.from_url(RedisServer(self.folder).url)
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
        word = next(word for word, known in ROLES.items() if known == role and ".js" not in word)
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


class Peer:
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
                options = {"cwd": PEER, "env": environ, "stdout": log, "stderr": log}
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


def sell(system, product: int, base: int, seconds: float) -> dict:
    """Sell as fast as it goes for `seconds`, then wait for the last order in PostgreSQL."""
    depths: list[tuple[float, int]] = []
    stopped = threading.Event()
    started = time.monotonic()

    def watch() -> None:
        while not stopped.wait(0.2):
            depths.append((time.monotonic() - started, system.metrics(product)["queue_depth"]))

    watcher = threading.Thread(target=watch)
    earlier = system.metrics(product)
    before = cpu_seconds(system.roots)
    watcher.start()
    try:
        figures = wrk("buy.lua", f"{system.url}/purchase", base, product, seconds=seconds)
        sold_seconds = figures["duration_us"] / 1e6
        drained = until(
            lambda: (m := system.metrics(product))["queue_depth"] == 0 and m, 180, "the drain"
        )
        all_seconds = time.monotonic() - started
    finally:
        stopped.set()
        watcher.join()
    after = cpu_seconds(system.roots)
    sold = earlier["stock_remaining"] - drained["stock_remaining"]
    if not figures["ok"] <= sold <= figures["ok"] + CONNECTIONS or figures["refused"]:
        raise Broken(f"{system.name}: {figures['ok']} answered, {sold} sold")
    stored = drained["total_processed"] - earlier["total_processed"]
    if stored != sold:
        raise Broken(f"{system.name}: {sold} sold, {stored} stored")
    return figures | {
        "sold": sold,
        "persisted_rate": sold / all_seconds,
        "drained_after": all_seconds - sold_seconds,
        "depths": depths,
        "deepest": max((depth for _, depth in depths), default=0),
        "cpu": per_order(before, after, sold),
    }


def refuse(system, product: int, users: Users, seconds: float) -> dict:
    """Measure refusals: of a product that is sold out, and of users over their limit."""
    url = f"{system.url}/purchase"
    sold_out = wrk("buy.lua", url, users.next(), product, seconds=seconds)
    limited = wrk("limited.lua", url, users.next(), 50, product, seconds=seconds)
    if sold_out["ok"] or limited["ok"] > 50 * 5:
        raise Broken(f"{system.name}: sold what it had not")
    return {"sold_out": sold_out, "limited": limited}


def round_of_ours(folder: Path, port: int, users: Users, seconds: float) -> dict:
    with Ours(folder, port).running() as system:
        wrk("buy.lua", f"{system.url}/purchase", users.next(), system.product(STOCK), seconds=1)
        result = sell(system, system.product(STOCK), users.next(), seconds)
        return result | refuse(system, system.product(0), users, seconds / 2)


def round_of_peer(folder: Path, port: int, processes: int, users: Users, seconds: float) -> dict:
    peer = Peer(folder, port, processes)
    with peer.running(STOCK):
        # Node compiles what is hot: a cold start would wrong it. One user can take five units.
        wrk("limited.lua", f"{peer.url}/purchase", users.next(), 1, 1, seconds=2)
        result = sell(peer, 1, users.next(), seconds)
    with peer.running(0):
        wrk("limited.lua", f"{peer.url}/purchase", users.next(), 1, 1, seconds=1)
        return result | refuse(peer, 1, users, seconds / 2)


def sell_beside(system: Ours, product: int, users: Users, dashboards: int, cookie: str) -> tuple:
    """Sell for 4 s with open dashboards, which poll once a second; return both loads' figures."""
    url, polled = f"{system.url}/admin/live", None
    with ThreadPoolExecutor() as pool:
        if dashboards:
            # From a second before to a second after.
            polled = pool.submit(
                wrk, "dashboards.lua", url, cookie, seconds=6, connections=dashboards
            )
            time.sleep(1)
        load = wrk("buy.lua", f"{system.url}/purchase", users.next(), product, seconds=4)
        found = polled.result() if polled else None
    if found and (found["refused"] or found["ok"] < 4 * dashboards):
        raise Broken(f"the dashboards were not served: {found}")
    return load, found


def dashboards_figures(system: Ours, product: int, users: Users) -> list[dict]:
    """Compare purchases without and with 20 open dashboards of 50 products, by turns."""
    while len(system.api.read("/products")) < 50:
        system.product(100)
    password = (system.folder / "admin_password").read_text().strip()
    # The session belongs to one kind of browser.
    cookie, pairs = sign_in(system.url, password, agent="dashboards.lua"), []
    for _ in range(5):
        alone, _ = sell_beside(system, product, users, 0, cookie)
        beside, polled = sell_beside(system, product, users, 20, cookie)
        pairs.append(
            {
                "ratio": beside["rate"] / alone["rate"],
                "p99_alone_us": alone["p99_us"],
                "p99_beside_us": beside["p99_us"],
                "poll_us": polled["p50_us"],
            }
        )
    return pairs


def single_figures(folder: Path, port: int, users: Users) -> dict:
    """Measure what needs no comparison: idle latency, a backlog's drain, memory per order."""
    found = {}
    with Ours(folder, port).running() as system:
        product, url = system.product(STOCK), f"{system.url}/purchase"
        found["idle"] = wrk("buy.lua", url, users.next(), product, seconds=4, connections=1)
        worker = system.pid_of("worker")
        # The rates of the last minute go by themselves; what is left is what the sale leaves.
        time.sleep(62)
        empty = system.redis.info("memory")["used_memory"]
        os.kill(worker, signal.SIGSTOP)
        try:
            while system.metrics(product)["queue_depth"] < 100_000:
                wrk("buy.lua", url, users.next(), product, seconds=3)
        finally:
            waiting = system.metrics(product)["queue_depth"]
            full = system.redis.info("memory")["used_memory"]
            os.kill(worker, signal.SIGCONT)
        started = time.monotonic()
        until(lambda: system.metrics(product)["queue_depth"] == 0, 120, "the backlog")
        found["backlog"] = {"orders": waiting, "rate": waiting / (time.monotonic() - started)}
        time.sleep(62)
        rest = system.redis.info("memory")["used_memory"]
        found["memory"] = {
            "waiting": (full - empty) / waiting,
            "persisted": (rest - empty) / waiting,
        }
        found["dashboards"] = dashboards_figures(system, product, users)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8)
    parser.add_argument("--port", type=int, default=8700)
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--no-growth", action="store_true")
    parser.add_argument("--quick", action="store_true", help="one short round of ours; no report")
    wanted = parser.parse_args()
    if not shutil.which("wrk"):
        print("wrk is not installed: apt-get install wrk", file=sys.stderr)
        return 2
    with_peer = not (wanted.no_peer or wanted.quick)
    if with_peer and not (shutil.which("node") and shutil.which("npm")):
        print("node and npm are not installed; --no-peer does without them", file=sys.stderr)
        return 2
    if with_peer and not (PEER / "node_modules").exists():
        subprocess.run(["npm", "ci", "--silent"], cwd=PEER, check=True)
    users, rounds = Users(), []
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        folder = Path(scratch)
        try:
            if wanted.quick:
                print(json.dumps(round_of_ours(folder / "ours", wanted.port, users, 4), indent=1))
                return 0
            for number in range(1, wanted.rounds + 1):
                print(f"round {number}", flush=True)
                results = {
                    "ours": round_of_ours(folder / "ours", wanted.port, users, wanted.seconds)
                }
                print(f"  ours {results['ours']['rate']:,.0f}/s", flush=True)
                with noop(wanted.port + 1) as url:
                    results["noop"] = wrk("buy.lua", url, 10**9, 1, seconds=wanted.seconds / 2)
                print(f"  no-op {results['noop']['rate']:,.0f}/s", flush=True)
                for processes in (1, 2) if with_peer else ():
                    name = f"peer{processes}"
                    results[name] = round_of_peer(
                        folder / name, wanted.port + 2, processes, users, wanted.seconds
                    )
                    print(f"  {name} {results[name]['rate']:,.0f}/s", flush=True)
                rounds.append(results)
            single = single_figures(folder / "ours", wanted.port, users)
            growth = None
            if not wanted.no_growth:
                from bench_growth import growth_figures

                growth = growth_figures(folder / "growth", wanted.port, users)
        except Broken as error:
            print(f"the run does not count: {error}", file=sys.stderr)
            return 1
    write_report(rounds, single, growth, wanted.seconds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
