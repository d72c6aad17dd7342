"""Kills, stops and cuts off every part of the system while shoppers buy, then checks every promise.

The whole system runs in a scratch directory, started by its supervisor: with the embedded servers,
or with servers behind a faulty proxy, by turns. The same seed gives the same purchases and the same
faults in the same order; when exactly a fault hits what is left to chance.
"""

import argparse
import contextlib
import http.client
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import psycopg2
import redis

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "stress")]

from checker import (
    OK,
    REFUSED,
    UNKNOWN,
    Attempt,
    Cancel,
    History,
    Restock,
    Stored,
    Violation,
    check,
    save,
)
from client import free_port, patience
from stored import read_rows

from app import create_app
from app.audit import Actor
from app.books import ledger
from app.config import SHARD_COUNTS, load_settings
from app.orders import cancelling as orders
from app.problems import Conflict, Unavailable, UnknownOrder
from app.run.embedded import PostgresServer, RedisServer
from app.stock.keys import Keys
from app.stock.shards import Part

TOKEN = "chaos-token-0123456789"
SECRET = "chaos-secret-0123456789"
KILLS = ("web", "worker", "redis", "postgres", "all")
# Every so many times "all" takes the supervisor too: a power cut, after which the system is started
# anew, embedded or with its servers behind proxies.
ROUNDS_PER_POWER_CUT = 6
PAUSES = ("pause web", "pause worker", "pause redis", "pause postgres", "backend")
CUTS = tuple(
    f"{fault} {side}"
    for side in ("redis", "postgres")
    for fault in ("cut", "lose", "tear", "delay", "refuse")
)
ANSWER_SECONDS = 5
# Far more than the slowest honest recovery; past it the system counts as stuck.
PATIENCE_SECONDS = 45
PRODUCTS = {1: 100, 2: 30_000, 3: 500}
# The supervisor waits longer before each restart of what dies again and again; killed on purpose,
# it would wait most of the time.
QUICK = "import sys; from app.run import processes, supervisor; "
QUICK += "processes.LAST_DELAY_SECONDS = 0.3; "
QUICK += "sys.exit(supervisor.main())"


class Stuck(Exception):
    """The system did not come back."""


class System:
    """The system under test. `proxied`: its servers are ours, behind faulty proxies."""

    def __init__(self, folder: Path, seed: int, quick: bool, shards: int = 1):
        self.folder, self.seed, self.quick, self.shards = folder, seed, quick, shards
        self.data = folder / "data"
        self.data.mkdir()
        self.port = free_port()
        self.redis = RedisServer(self.data)
        self.postgres = PostgresServer(self.data)
        self.proxied = False
        self.supervisor: subprocess.Popen | None = None
        self.proxies: dict[str, subprocess.Popen] = {}

    def start(self, proxied: bool) -> None:
        self.proxied = proxied
        environ = {
            **os.environ,
            "DATA_DIR": str(self.data),
            "PORT": str(self.port),
            "WEB_WORKERS": "2",
            "SHARDS": str(self.shards),
            "SECRET_KEY": SECRET,
            "ADMIN_API_TOKEN": TOKEN,
            "PURCHASE_USER_LIMIT": "off",
            "PURCHASE_ADDRESS_LIMIT": "off",
        }
        for name in ("REDIS_URL", "DATABASE_URL"):
            environ.pop(name, None)
        if proxied:
            self.redis.start(patience(PATIENCE_SECONDS))
            self.postgres.start(patience(PATIENCE_SECONDS))
            for name, server in (("redis", self.redis), ("postgres", self.postgres)):
                folder = self.folder / f"{name}-proxy"
                folder.mkdir(exist_ok=True)
                listen = folder / server.socket_name
                self.proxies[name] = subprocess.Popen(
                    [sys.executable, ROOT / "stress" / "fault_proxy.py", listen, server.socket,
                     str(self.seed)],
                    stdin=subprocess.PIPE,
                )  # fmt: skip
            environ["REDIS_URL"] = f"unix://{self.folder}/redis-proxy/{self.redis.socket_name}"
            environ["DATABASE_URL"] = (
                f"postgresql://flashsale@/flashsale?host={self.folder}/postgres-proxy"
            )
        with (self.folder / "supervisor.log").open("ab") as log:
            self.supervisor = subprocess.Popen(
                [sys.executable, *(("-c", QUICK) if self.quick else ("-m", "app.run.supervisor"))],
                cwd=ROOT,
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def processes(self, kind: str) -> list[psutil.Process]:
        """Return the running processes of a kind, in a stable order."""
        found = []
        roots = [self.supervisor.pid]
        if self.proxied:
            roots += [s.process.pid for s in (self.redis, self.postgres) if s.process]
        for root in roots:
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(root)
                found += [process, *process.children(recursive=True)]
        return sorted(
            (process for process in found if self._is(process, kind)), key=lambda p: p.pid
        )

    def _is(self, process: psutil.Process, kind: str) -> bool:
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                return False
            words = process.cmdline() or [""]
            if kind == "web":
                return "app.run.serve" in words or "web.py" in words
            if kind == "worker":
                return words[1:2] == ["worker.py"]
            if kind == "redis":
                return "valkey-server" in words[0]
            if kind == "postgres":
                return words[0].endswith("/postgres") and "-D" in words
            if kind == "backend":
                return words[0].startswith("postgres: flashsale")
            return True
        except (psutil.Error, AttributeError):
            return False

    def signal(self, kind: str, number: int, choose: random.Random) -> list[int]:
        """Send a signal to one process of the kind; return its pid, or nothing."""
        processes = self.processes(kind)
        if not processes:
            return []
        process = choose.choice(processes)
        with contextlib.suppress(psutil.Error):
            process.send_signal(number)
            return [process.pid]
        return []

    def tend(self) -> None:
        """Start our own servers again when they are gone, as a service manager would."""
        if self.proxied:
            for server in (self.redis, self.postgres):
                if server.process and server.process.poll() is not None:
                    server.start(patience(PATIENCE_SECONDS))

    def proxy(self, name: str, command: str) -> None:
        proxy = self.proxies[name]
        proxy.stdin.write(f"{command}\n".encode())
        proxy.stdin.flush()

    def kill_parts(self) -> None:
        """Kill everything but the supervisor at once."""
        for process in self.processes("any"):
            if process.pid != self.supervisor.pid:
                with contextlib.suppress(psutil.Error):
                    process.kill()

    def kill_all(self) -> None:
        """Kill everything at once, the supervisor included."""
        for process in self.processes("any"):
            with contextlib.suppress(psutil.Error):
                process.kill()
        self.supervisor.wait()
        for server in (self.redis, self.postgres):
            server.kill()
            server.process = None
        for proxy in self.proxies.values():
            proxy.kill()
            proxy.wait()
        self.proxies.clear()

    def stop(self) -> None:
        with contextlib.suppress(Exception):
            self.supervisor.send_signal(signal.SIGTERM)
            self.supervisor.wait(patience(15))
        self.kill_all()


class Clients:
    """Shoppers, a restocker and a canceller; the history has every attempt and its outcome."""

    def __init__(self, port: int, seed: int, app, shoppers: int):
        self.port, self.app, self.seed = port, app, seed
        self.history = History()
        self.stopped = threading.Event()
        self.last_ok = time.monotonic()
        self.statuses: Counter = Counter()
        self.slowest = 0.0
        self.threads = [
            threading.Thread(target=self.shop, args=(number,), daemon=True)
            for number in range(shoppers)
        ]
        self.threads += [
            threading.Thread(target=self.restock, daemon=True),
            threading.Thread(target=self.cancel, daemon=True),
        ]

    def start(self) -> None:
        for thread in self.threads:
            thread.start()

    def stop(self) -> None:
        """Let everybody finish; who doesn't know an outcome yet goes on asking for a while."""
        self.stopped.set()
        for thread in self.threads:
            thread.join(patience(PATIENCE_SECONDS))

    def shop(self, number: int) -> None:
        choose = random.Random(f"{self.seed} shopper {number}")
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=ANSWER_SECONDS)
        users = [number * 10_000_000 + 1]
        while not self.stopped.is_set():
            # Mostly somebody new, sometimes one who has bought before.
            if choose.random() < 0.7 or len(users) < 2:
                users.append(users[-1] + 1)
                user = users[-1]
            else:
                user = choose.choice(users[-50:])
            key = f"{number}-{choose.getrandbits(48):x}" if choose.random() < 0.6 else None
            product, quantity = choose.choice((1, 2, 2, 2, 3)), choose.randint(1, 3)
            attempt = self.buy(connection, user, product, quantity, key)
            deadline = time.monotonic() + patience(PATIENCE_SECONDS)
            while key and attempt.outcome == UNKNOWN and time.monotonic() < deadline:
                time.sleep(choose.uniform(0.02, 0.2))
                attempt = self.buy(connection, user, product, quantity, key)
            if key and attempt.outcome == OK and choose.random() < 0.2:
                self.buy(connection, user, product, quantity, key)
            time.sleep(choose.expovariate(1 / 0.01))
        connection.close()

    def buy(self, connection, user, product, quantity, key) -> Attempt:
        body = {"userId": user, "productId": product, "quantity": quantity}
        status, answer = self.call(
            connection, "POST", "/purchase", body, {"Idempotency-Key": key} if key else {}
        )
        outcome, order = UNKNOWN, None
        if status == 200:
            outcome, order = OK, answer["orderId"]
            self.last_ok = time.monotonic()
        elif 400 <= status < 500:
            outcome = REFUSED
        attempt = Attempt(user, product, quantity, key, outcome, status, order)
        self.history.attempts.append(attempt)
        return attempt

    def call(self, connection, method, path, body, headers) -> tuple[int, dict]:
        started = time.monotonic()
        try:
            connection.request(
                method, path, json.dumps(body), {"Content-Type": "application/json", **headers}
            )
            response = connection.getresponse()
            status, answer = response.status, json.loads(response.read())
        except (OSError, http.client.HTTPException, ValueError) as error:
            connection.close()
            self.statuses[type(error).__name__] += 1
            return 0, {}
        finally:
            self.slowest = max(self.slowest, time.monotonic() - started)
        self.statuses[f"{status} {answer.get('code') or answer.get('status') or ''}".strip()] += 1
        return status, answer

    def restock(self) -> None:
        choose = random.Random(f"{self.seed} restocks")
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=ANSWER_SECONDS)
        number = 0
        while not self.stopped.wait(choose.uniform(0.05, 0.5)):
            number += 1
            product, units = choose.choice(tuple(PRODUCTS)), choose.randint(1, 60)
            headers = {"Authorization": f"Bearer {TOKEN}", "Idempotency-Key": f"restock-{number}"}
            deadline = time.monotonic() + patience(PATIENCE_SECONDS)
            outcome = UNKNOWN
            while outcome == UNKNOWN and time.monotonic() < deadline:
                status, _ = self.call(
                    connection,
                    "POST",
                    "/products/restock",
                    {"productId": product, "amount": units},
                    headers,
                )
                if status == 200:
                    outcome = OK
                elif 400 <= status < 500 and status != 429:
                    outcome = REFUSED
                self.history.restocks.append(Restock(f"restock-{number}", product, units, outcome))
                if outcome == UNKNOWN:
                    time.sleep(0.1)

    def cancel(self) -> None:
        """Cancel some of the promised orders, as the admin page does."""
        choose = random.Random(f"{self.seed} cancels")
        actor = Actor("chaos")
        done: set[int] = set()
        while not self.stopped.wait(choose.uniform(0.05, 0.3)):
            promised = [a.order for a in self.history.attempts[-400:] if a.outcome == OK]
            wanted = [order for order in promised if order not in done]
            if not wanted:
                continue
            order_id = choose.choice(wanted)
            units = choose.choice([None, None, 1])
            outcome = UNKNOWN
            try:
                with self.app.app_context():
                    orders.cancel(order_id, "chaos", actor, units)
                outcome = OK
                if units is None:
                    done.add(order_id)
            except UnknownOrder:
                outcome = REFUSED
            except Conflict:
                # There is nothing left of it; an attempt of an unknown end was the last.
                done.add(order_id)
            except Exception as error:
                if not isinstance(error, Unavailable) and "psycopg2" not in repr(error):
                    self.statuses[f"cancel: {type(error).__name__}"] += 1
            self.history.cancels.append(Cancel(order_id, outcome, units))


@dataclass
class Options:
    kills: int
    minutes: float
    seed: int
    shoppers: int
    kinds: tuple[str, ...]
    faults: float
    quick: bool
    keep: str | None
    shards: int


class Run:
    """One run: the schedule, its faults, and the verdict."""

    def __init__(self, options: Options, folder: Path):
        self.options = options
        self.choose = random.Random(options.seed)
        self.system = System(folder, options.seed, options.quick, options.shards)
        self.keys = [Keys(Part(number, options.shards)) for number in range(options.shards)]
        self.done: Counter = Counter()
        self.recovered: dict[str, list[float]] = defaultdict(list)
        self.violations: list[Violation] = []

    def run(self) -> int:
        started = time.monotonic()
        system = self.system
        try:
            system.start(proxied=True)
            settings = replace(
                load_settings({"SHARDS": str(self.options.shards)}),
                redis_url=system.redis.url,
                database_url=system.postgres.url,
                data_dir=system.data,
                secret_key=SECRET,
                admin_api_token=TOKEN,
                admin_password="chaos-password",
            )
            self.app = create_app(settings)
            self.wait_ready()
            self.clients = Clients(system.port, self.options.seed, self.app, self.options.shoppers)
            self.open_sale()
            self.clients.start()
            self.wait_for_sale("start")
            self.hurt()
            self.heal()
            history, stored = self.clients.history, self.read_stored()
            self.violations += check(history, stored)
            self.violations += [
                Violation("error", f"answered {status}: {count} times")
                for status, count in self.clients.statuses.items()
                if status.startswith("500")
            ]
            if self.options.keep:
                save(Path(self.options.keep), history, stored)
        except Stuck as error:
            self.violations.append(Violation("stuck", str(error)))
            history, stored = self.clients.history, Stored()
        finally:
            system.stop()
        self.report(history, stored, time.monotonic() - started)
        return 1 if self.violations else 0

    def open_sale(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.system.port, timeout=10)
        for product, units in PRODUCTS.items():
            if product == 1:
                continue
            body = {"name": f"p{product}", "priceCents": 100, "currency": "EUR", "stock": units}
            status, answer = self.clients.call(
                connection, "POST", "/products", body, {"Authorization": f"Bearer {TOKEN}"}
            )
            if status != 201 or answer["id"] != product:
                raise Stuck(f"product {product} could not be made: {status} {answer}")
        connection.close()

    def hurt(self) -> None:
        """Kill round after round: each kind once, in any order, everything at once last."""
        end = time.monotonic() + self.options.minutes * 60
        single = [kind for kind in self.options.kinds if kind != "all"]
        while True:
            self.choose.shuffle(single)
            for kind in (*single, *(("all",) if "all" in self.options.kinds else ())):
                hits = sum(self.done[k] for k in self.options.kinds)
                if self.options.kills and hits >= self.options.kills:
                    return
                if self.options.minutes and time.monotonic() > end:
                    return
                if self.choose.random() < self.options.faults:
                    self.disturb()
                time.sleep(self.choose.uniform(0.02, 0.3))
                self.kill(kind)

    def kill(self, kind: str) -> None:
        what = f"kill {kind}"
        if kind in KILLS:
            self.done[kind] += 1
        if kind == "all" and self.done[kind] % ROUNDS_PER_POWER_CUT == 0:
            what = "power cut"
            self.system.kill_all()
            self.done["power cut"] += 1
            self.system.start(proxied=self.choose.random() < 0.5)
        elif kind == "all":
            self.system.kill_parts()
        elif kind in KILLS:
            self.wait_for_process(kind)
            self.system.signal(kind, signal.SIGKILL, self.choose)
        else:
            what = kind
            self.disturb(kind)
        hit_at = time.monotonic()
        self.system.tend()
        self.wait_for_sale(what, hit_at)

    def wait_for_process(self, kind: str) -> None:
        deadline = time.monotonic() + patience(PATIENCE_SECONDS)
        while not self.system.processes(kind):
            if time.monotonic() > deadline:
                raise Stuck(f"no {kind} process came back")
            self.system.tend()
            time.sleep(0.02)

    def disturb(self, fault: str = "") -> None:
        """Stop something for a while, cut or delay its connections, or kill one session."""
        fault = fault or self.choose.choice(PAUSES + (CUTS if self.system.proxied else ()))
        self.done[fault] += 1
        word, _, side = fault.partition(" ")
        if fault == "backend":
            self.system.signal("backend", signal.SIGKILL, self.choose)
        elif word == "pause":
            for pid in self.system.signal(side, signal.SIGSTOP, self.choose):
                time.sleep(self.choose.choice((0.05, 0.2, 0.5, 1.3)))
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
        else:
            value = {"lose": 0.05, "tear": 0.05, "delay": self.choose.choice((0.05, 0.4, 1.2))}
            self.system.proxy(side, f"{word} {value.get(word, '')}")
            time.sleep(self.choose.uniform(0.1, 0.6))
            self.system.proxy(side, "pass")

    def wait_for_sale(self, what: str, since: float | None = None) -> None:
        """Wait until something is sold again."""
        since = since or time.monotonic()
        while self.clients.last_ok <= since:
            if time.monotonic() - since > patience(PATIENCE_SECONDS):
                raise Stuck(f"nothing was sold for {PATIENCE_SECONDS} s after {what}")
            self.system.tend()
            time.sleep(0.01)
        self.recovered[what].append(self.clients.last_ok - since)

    def wait_ready(self) -> None:
        deadline = time.monotonic() + patience(PATIENCE_SECONDS)
        answer = ""
        while time.monotonic() < deadline:
            self.system.tend()
            connection = http.client.HTTPConnection("127.0.0.1", self.system.port, timeout=3)
            try:
                connection.request("GET", "/readyz")
                response = connection.getresponse()
                answer = response.read().decode()
                if response.status == 200:
                    return
            except (OSError, http.client.HTTPException) as error:
                answer = str(error)
            finally:
                connection.close()
            time.sleep(0.05)
        raise Stuck(f"not ready after {PATIENCE_SECONDS} s: {answer}")

    def heal(self) -> None:
        """Let everything run, let the clients finish, and wait until all is stored."""
        self.wait_ready()
        self.clients.stop()
        client = redis.Redis.from_url(self.system.redis.url)
        quiet_at = time.monotonic()
        with contextlib.closing(psycopg2.connect(self.dsn())) as connection:
            connection.autocommit = True
            while time.monotonic() < quiet_at + patience(PATIENCE_SECONDS):
                with connection.cursor() as cursor:
                    # What one shard lent another, and a killed process did not give, too.
                    waiting = self.waiting(client) + sum(client.xlen(of.sent) for of in self.keys)
                    cursor.execute(
                        "SELECT EXISTS (SELECT FROM stock_movements WHERE applied_at IS NULL)"
                        " OR EXISTS (SELECT FROM order_intents WHERE applied_at IS NULL)"
                    )
                    if not waiting and not cursor.fetchone()[0]:
                        break
                time.sleep(0.01)
        self.drained_seconds = time.monotonic() - quiet_at
        client.close()

    def waiting(self, client: redis.Redis) -> int:
        return sum(client.xlen(of.outbox) for of in self.keys)

    def dsn(self) -> str:
        return f"host={self.system.postgres.sockets} user=flashsale dbname=flashsale"

    def read_stored(self) -> Stored:
        with self.app.app_context():
            result = ledger.check(rows=True)
        problems = list(result.problems)
        for product in result.products.values():
            problems += [f"product {product.product_id}: {text}" for text in product.problems]
        with redis.Redis.from_url(self.system.redis.url, decode_responses=True) as client:
            free = {
                product: sum(int(client.hget(of.product(product), "free")) for of in self.keys)
                for product in PRODUCTS
            }
            waiting = self.waiting(client)
        return Stored(*read_rows(self.dsn()), free, waiting, problems)

    def report(self, history: History, stored: Stored, seconds: float) -> None:
        kills = {kind: self.done[kind] for kind in KILLS if self.done[kind]}
        others = {kind: count for kind, count in sorted(self.done.items()) if kind not in KILLS}
        outcomes = Counter(attempt.outcome for attempt in history.attempts)
        print(f"seed {self.options.seed}, {seconds:.0f} s, shards: {self.options.shards}")
        print(f"kills: {sum(kills.values())} {kills}")
        print(f"other faults: {sum(others.values())} {others}")
        print(f"purchase attempts: {len(history.attempts)} {dict(outcomes)}")
        print(f"answers: {dict(self.clients.statuses.most_common())}")
        print(f"slowest answer: {self.clients.slowest:.2f} s")
        print(
            f"stored: {len(stored.orders)} orders,"
            f" {sum(order.status == 'CANCELLED' for order in stored.orders)} of them cancelled,"
            f" {sum(movement.kind == 'restock' for movement in stored.movements)} restocks,"
            f" {len(stored.dead_letters)} dead letters"
        )
        for what, times in sorted(self.recovered.items()):
            print(
                f"sold again after {what}: median {statistics.median(times):.2f} s,"
                f" at most {max(times):.2f} s ({len(times)} times)"
            )
        if hasattr(self, "drained_seconds"):
            print(f"everything stored {self.drained_seconds:.2f} s after the last purchase")
        for kind, count in Counter(violation.kind for violation in self.violations).items():
            print(f"VIOLATED {kind}: {count} times")
        for violation in self.violations[:20]:
            print(f"  {violation}")
        if not self.violations:
            print("Every promise was kept.")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--kills", type=int, default=0, help="stop after so many (100)")
    length.add_argument("--minutes", type=float, default=0, help="or after so long")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--shoppers", type=int, default=12, help="%(default)s")
    parser.add_argument(
        "--kinds",
        default=",".join(KILLS),
        help=f"what to do to it (%(default)s; also {', '.join(PAUSES + CUTS)})",
    )
    parser.add_argument(
        "--faults", type=float, default=0.5, help="other faults for each kill (%(default)s)"
    )
    parser.add_argument("--shards", type=int, choices=SHARD_COUNTS, default=1, help="%(default)s")
    parser.add_argument("--quick", action="store_true", help="the supervisor's delays don't grow")
    parser.add_argument("--keep", metavar="FILE", help="write what happened, for checker.py")
    words = parser.parse_args()
    options = Options(
        kills=words.kills if words.kills or words.minutes else 100,
        minutes=words.minutes,
        seed=words.seed,
        shoppers=words.shoppers,
        kinds=tuple(words.kinds.split(",")),
        faults=words.faults,
        quick=words.quick,
        keep=words.keep,
        shards=words.shards,
    )
    # Told to stop, it stops the system under test as well.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    folder.chmod(0o755)
    code = 1
    try:
        code = Run(options, folder).run()
    finally:
        if code:
            print(f"logs: {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
