"""A disk that is really full, under the whole system: nothing is lost, and selling goes on."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import psycopg2
import pytest
import redis
from system import UNLIMITED, Server, start_system, stop_system
from waiting import patience, wait_until

from app.config import ROOT
from app.run.embedded import PostgresServer, RedisServer
from app.stock.keys import KEYS

pytestmark = pytest.mark.drill

STOCK = 100_000
SHOPPERS = 8
# No answer takes longer, whatever is full.
LONGEST_SECONDS = 2.5
# The supervisor tries a server again after 5 s at most, and the server has to read its log.
BACK_WITHIN_SECONDS = 8
# PostgreSQL's empty cluster takes 46 MB, and each piece of its log 16 MB.
SIZES_MB = {"redis": 16, "postgres": 128}


@dataclass
class Answer:
    """What a shopper was told; with the same key they may ask again."""

    user: int
    key: str
    status: int
    order: int | None
    retry_after: str | None
    seconds: float


@dataclass
class Machine:
    """The whole system, with a small disk of its own for each server."""

    system: Server
    redis: RedisServer
    postgres: PostgresServer
    # Each round of shoppers has users of its own, so that every attempt is a purchase of its own.
    rounds: Iterator[int] = field(default_factory=lambda: count(1))

    def fill(self, name: str) -> Path:
        """Take every byte that is left on a server's disk; return the file that holds them."""
        ballast = self.system.data_dir / name / "ballast"
        with ballast.open("wb", buffering=0) as file:
            for size in (1 << 20, 1 << 12, 1):
                try:
                    while True:
                        file.write(bytes(size))
                except OSError:
                    continue
        assert os.statvfs(ballast).f_bavail == 0
        return ballast

    def buy(self, user: int, key: str) -> Answer:
        status, headers, content, seconds = self.system.call(
            "POST", "/purchase", {"userId": user, "productId": 1}, **{"Idempotency-Key": key}
        )
        order = json.loads(content)["orderId"] if status == 200 else None
        return Answer(user, key, status, order, headers.get("retry-after"), seconds)

    def restarts(self) -> int:
        """Return how often the supervisor has seen Redis end by itself."""
        log = (self.system.data_dir / "supervisor.log").read_text()
        return log.count("Redis ended with exit code 1;")

    def status(self, path: str) -> int:
        return self.system.call("GET", path)[0]

    def metrics(self) -> dict:
        return json.loads(self.system.call("GET", "/purchase/metrics")[2])

    def waiting(self) -> int:
        """Return how many orders wait to be stored; asked of Redis, which limits nobody."""
        with redis.Redis.from_url(self.redis.url) as client:
            return client.xlen(KEYS.outbox)

    def query(self, statement: str) -> list[tuple]:
        connection = psycopg2.connect(
            host=str(self.postgres.sockets), user="flashsale", dbname="flashsale"
        )
        connection.autocommit = True
        try:
            with connection.cursor() as cursor:
                cursor.execute(statement)
                return cursor.fetchall() if cursor.description else []
        finally:
            connection.close()

    def ends_its_log(self) -> bool:
        """Have PostgreSQL begin a new piece of its log; tell whether it is gone by then."""
        with suppress(psycopg2.OperationalError):
            self.query("SELECT pg_switch_wal(), txid_current()")
        return not self.postgres.is_running()

    @contextmanager
    def shoppers(self) -> Iterator[list[Answer]]:
        """People who buy all the time, one unit each, while the context lasts."""
        answers: list[Answer] = []
        stopped = threading.Event()

        def shop(first: int) -> None:
            user = first
            while not stopped.is_set():
                answers.append(self.buy(user, f"key-{user}"))
                user += SHOPPERS
                stopped.wait(0.01)

        first = 1_000_000 * next(self.rounds)
        with ThreadPoolExecutor(SHOPPERS) as pool:
            shopping = [pool.submit(shop, first + number) for number in range(SHOPPERS)]
            try:
                yield answers
            finally:
                stopped.set()
        for shopper in shopping:
            shopper.result()


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    data_dir = tmp_path_factory.mktemp("machine")
    mounted = []
    try:
        for name, size in SIZES_MB.items():
            (data_dir / name).mkdir()
            mount(data_dir / name, size)
            mounted.append(data_dir / name)
        system = start_system(
            data_dir,
            **UNLIMITED,
            WEB_WORKERS="2",
        )
        try:
            machine = Machine(system, RedisServer(data_dir), PostgresServer(data_dir))
            restock = {"productId": 1, "amount": STOCK - 100}
            token = {"Authorization": f"Bearer {system.api_token}"}
            assert system.call("POST", "/products/restock", restock, **token)[0] == 200
            yield machine
        finally:
            stop_system(system)
    finally:
        for folder in mounted:
            # Lazily, so that a process on its way out can't keep the disk.
            subprocess.run(["umount", "--lazy", folder], check=True)


def mount(folder: Path, size_mb: int) -> None:
    if os.geteuid() != 0:
        pytest.skip("a disk to fill can be mounted by root only")
    options = f"size={size_mb}m,mode=700"
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"no disk to fill can be mounted here: {done.stderr.strip()}")


@pytest.fixture
def roomy(machine):
    """The machine with room on its disks, before the test and after it."""
    wait_until(lambda: machine.status("/readyz") == 200, 20, "readiness")
    yield machine
    for name in SIZES_MB:
        (machine.system.data_dir / name / "ballast").unlink(missing_ok=True)
    wait_until(lambda: machine.status("/readyz") == 200, 20, "readiness")


def settle_and_judge(machine: Machine, answers: list[Answer]) -> None:
    """Everybody who was told nothing asks again; then each must have exactly what was promised."""
    assert {answer.status for answer in answers} <= {200, 503}
    assert all(answer.retry_after for answer in answers if answer.status == 503)
    assert max(answer.seconds for answer in answers) < patience(LONGEST_SECONDS)
    promised = {(a.user, a.key): a.order for a in answers if a.status == 200}
    for answer in answers:
        if answer.status == 503:
            again = machine.buy(answer.user, answer.key)
            assert again.status == 200
            promised[answer.user, answer.key] = again.order
    wait_until(lambda: machine.waiting() == 0, 5, "the orders to be stored")
    first, last = min(promised)[0], max(promised)[0]
    stored = machine.query(
        "SELECT user_id, idempotency_key, id FROM orders"
        f" WHERE user_id BETWEEN {first} AND {last} AND status = 'CONFIRMED' AND quantity = 1"
    )
    assert sorted(stored) == sorted((*who, order) for who, order in promised.items())
    assert machine.query("SELECT * FROM dead_letters") == []
    ((sold,),) = machine.query("SELECT count(*) FROM orders")
    assert machine.metrics()["stock_remaining"] == STOCK - sold
    checked = subprocess.run(
        [sys.executable, "-m", "flask", "--app", "wsgi", "ledger", "check"],
        cwd=ROOT,
        env=os.environ | {"DATA_DIR": str(machine.system.data_dir)},
        capture_output=True,
        text=True,
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


def sold(answers: list[Answer]) -> int:
    return sum(answer.status == 200 for answer in answers)


@pytest.mark.parametrize("appendfsync", ["always", "everysec"])
def test_redis_has_no_disk_left(roomy, appendfsync):
    """With a log that is written before each answer it ends; with another it refuses writes."""
    machine = roomy
    client = redis.Redis.from_url(machine.redis.url)
    client.config_set("appendfsync", appendfsync)
    server = client.info("server")["process_id"]
    with machine.shoppers() as answers:
        wait_until(lambda: sold(answers) > 50, 10, "purchases")
        before = machine.restarts()
        ballast = machine.fill("redis")
        if appendfsync == "always":
            wait_until(lambda: machine.restarts() > before + 2, 20, "Redis to end several times")
        # The last few bytes may still hold a claim.
        wait_until(lambda: {answer.status for answer in answers[-300:]} == {503}, 20, "refusals")
        if appendfsync == "everysec":
            with pytest.raises(redis.ResponseError, match="MISCONF Errors writing to the AOF"):
                client.set("anything", 1)
        for path in ("/purchase/orders/1", "/purchase/metrics", "/products", "/admin/"):
            status, _, _, seconds = machine.system.call("GET", path)
            assert status in (200, 302, 503), path
            assert seconds < patience(LONGEST_SECONDS), path
        ballast.unlink()
        freed = len(answers)
        wait_until(lambda: sold(answers[freed:]) > 50, BACK_WITHIN_SECONDS, "new sales")
    assert (client.info("server")["process_id"] == server) == (appendfsync == "everysec")
    client.close()
    settle_and_judge(machine, answers)


@pytest.mark.parametrize("part", ["tables", "log"])
def test_postgres_has_no_disk_left(roomy, part):
    """Where its tables can't grow it refuses; where its log can't, it ends and can't start."""
    machine = roomy
    before = machine.postgres.log.stat().st_size
    with machine.shoppers() as answers:
        wait_until(lambda: sold(answers) > 50, 10, "purchases")
        ballast = machine.fill("postgres")
        if part == "log":
            wait_until(machine.ends_its_log, 10, "PostgreSQL to end")
        # Shoppers buy so many in several seconds: jobs and the relay have tried in vain by then.
        wait_until(lambda: machine.waiting() > 3000, 30, "orders to wait")
        assert b"No space left on device" in machine.postgres.log.read_bytes()[before:]
        assert machine.postgres.is_running() == (part == "tables")
        ballast.unlink()
        wait_until(lambda: machine.waiting() < 200, BACK_WITHIN_SECONDS, "storing")
    assert {answer.status for answer in answers} == {200}
    settle_and_judge(machine, answers)
