"""What a claim costs Redis: microseconds of its CPU by outcome and by how many go in one batch.

    python stress/bench_claim.py [--claims 20000] [--fsync always]

A server of its own in a scratch directory; nothing else talks to it. Batches are sent as many at a
time as hold 64 claims, as a busy web process would. `bytes` is what an order
takes of Redis's memory while it waits, attempts left out.
"""

import argparse
import sys
import tempfile
import uuid
from dataclasses import replace
from importlib import resources
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

import redis

from app.config import NO_LIMIT, load_settings
from app.run.embedded import RedisServer
from app.stock.claims import ClaimScript, Request
from app.stock.keys import KEYS

IN_FLIGHT = 64
SIZES = (1, 4, 8, 16, 32, 64)


class Sale:
    """One product on sale in an empty Redis."""

    def __init__(self, server: RedisServer, fsync: str, limited: bool) -> None:
        self.redis = redis.Redis.from_url(server.url)
        self.redis.config_set("appendfsync", fsync)
        settings = load_settings({})
        if not limited:
            settings = replace(
                settings, purchase_user_limit=NO_LIMIT, purchase_address_limit=NO_LIMIT
            )
        text = (resources.files("app.stock.lua") / "claim.lua").read_text()
        self.script = ClaimScript(text, settings)
        self.connection = self.redis.connection_pool.get_connection()
        self.ask([self.script.load])

    def begin(self, free: int) -> None:
        self.redis.flushdb()
        self.redis.set(KEYS.generation, "sale")
        terms = {"max": 10, "cap": 10, "pause": 0, "price": "1999 EUR", "opens": "", "closes": ""}
        figures = {"free": free, "moved": free, "accepted": 0, "claimed": 0}
        self.redis.hset(KEYS.product(1), mapping=terms | figures)

    def ask(self, commands: list[bytes]) -> list:
        self.connection.send_packed_command(commands)
        return [self.connection.read_response() for _ in commands]

    def decide(self, requests: list[Request], size: int) -> set[bytes]:
        """Have them decided in batches of this size; return the outcomes."""
        outcomes = set()
        for start in range(0, len(requests), IN_FLIGHT):
            some = requests[start : start + IN_FLIGHT]
            batches = [some[at : at + size] for at in range(0, len(some), size)]
            answers = self.ask([self.script.command(*batch) for batch in batches])
            outcomes.update(claim[0] for batch in answers for claim in batch)
        return outcomes

    def cpu(self) -> float:
        info = self.redis.info("cpu")
        return (info["used_cpu_user"] + info["used_cpu_sys"]) * 1e6

    def memory(self) -> int:
        """Return the bytes of all that the sale holds, but the attempts, which pass."""
        kept = {name.encode() for name in KEYS.attempts}
        with self.redis.pipeline(transaction=False) as pipe:
            for name in self.redis.scan_iter(count=10_000):
                if name not in kept:
                    pipe.memory_usage(name, samples=0)
            return sum(pipe.execute())


def requests(count: int, first: int = 10**6, keyed: bool = False, text: bool = False):
    """One request each of new users at new addresses."""
    return [
        Request(
            str(uuid.UUID(int=user * 0x9E3779B97F4A7C15 % 2**128)) if text else user,
            1,
            1,
            str(uuid.UUID(int=user)) if keyed else None,
            f"10.{user >> 16 & 255}.{user >> 8 & 255}.{user & 255}",
        )
        for user in range(first, first + count)
    ]


def measure(sale: Sale, size: int, count: int) -> dict[str, tuple[float, float]]:
    """Return (µs, bytes) of a claim by outcome."""
    found = {}
    plain, keyed = requests(count), requests(count, keyed=True)
    texts = requests(count, text=True)

    def run(name, asked, outcome, free=10**9):
        if free is not None:
            sale.begin(free)
        before = sale.cpu()
        outcomes = sale.decide(asked, size)
        assert outcomes == {outcome}, (name, outcomes)
        used = sale.cpu() - before
        found[name] = used / count, sale.memory() / count

    run("accepted", plain, b"accepted")
    run("accepted, UUID user", texts, b"accepted")
    run("accepted, UUID key", keyed, b"accepted")
    run("replayed", keyed, b"replayed", free=None)
    run("sold out", plain, b"sold_out", free=0)
    return found


def figures(claims: int, fsync: str, sizes=SIZES, limited: bool = True) -> dict[int, dict]:
    """Return what `measure` finds, by the size of the batches."""
    with tempfile.TemporaryDirectory() as folder:
        server = RedisServer(Path(folder))
        server.start()
        try:
            sale = Sale(server, fsync, limited)
            return {size: measure(sale, size, claims) for size in sizes}
        finally:
            server.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--claims", type=int, default=20_000)
    parser.add_argument("--fsync", choices=("no", "always"), default="no")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--unlimited", action="store_true", help="no user or address limit")
    options = parser.parse_args()
    rows = figures(options.claims, options.fsync, options.sizes, not options.unlimited)
    names = list(next(iter(rows.values())))
    print("claims in a batch".ljust(22), *(f"{size:>7}" for size in rows), "   bytes")
    for name in names:
        columns = [f"{rows[size][name][0]:7.1f}" for size in rows]
        print(name.ljust(22), *columns, f"{rows[options.sizes[-1]][name][1]:8.0f}")


if __name__ == "__main__":
    main()
