"""What several shards cost: Redis's CPU for a claim on 1 to 3 primaries, and how long a pull takes.

    python stress/bench_shards.py [--rounds 5] [--claims 20000] [--pulls 500]

Nodes of its own on loopback, in scratch directories; nobody else talks to them. A claim's CPU is
the sum over all primaries, in batches of the same size everywhere; each round has its own ratio to
one server without shards. A pull is a claim whose shard has nothing left, while one of the others
has one unit: from the claim to its 200, by the event loop's lines. No fsync, as in bench_claim.py.
"""

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

import redis
from bench_claim import IN_FLIGHT, requests

from app.config import NO_LIMIT, Settings, load_settings
from app.run.cluster import Cluster
from app.run.embedded import RedisServer
from app.stock.claims import ClaimScript, Request
from app.stock.dealing import unseal
from app.stock.link import scripts
from app.stock.place import place
from app.stock.pulls import LoopPulls, carry_out
from app.stock.servers import Server
from app.stock.shard import Shard
from app.stock.shards import Part

SALE = "5a1e"
PRODUCT = 1
TERMS = {"max": 10, "cap": "", "pause": 0, "price": "1999 EUR", "opens": "", "closes": "",
         "hold": "", "version": 1}  # fmt: skip
COUNTERS = ("moved", "accepted", "claimed", "settled", "settled_units", "persisted", "held")
# Name, shards, primaries (0: one server, no cluster), replicas of each.
LAYOUTS = (
    ("1 shard, 1 server", 1, 0, 0),
    ("6 shards, 1 primary", 6, 1, 0),
    ("6 shards, 2 primaries", 6, 2, 0),
    ("6 shards, 3 primaries", 6, 3, 0),
    ("6 shards, 3 primaries, WAIT 1", 6, 3, 1),
)
PULLED = (("24 shards, 1 server", 24, 0, 0), ("24 shards, 3 primaries, WAIT 1", 24, 3, 1))


def limitless(replicas: int) -> Settings:
    settings = load_settings({"REDIS_REPLICAS": str(replicas)})
    return replace(settings, purchase_user_limit=NO_LIMIT, purchase_address_limit=NO_LIMIT)


class Sale:
    """So many shards on running nodes, with a product of which none is on sale."""

    def __init__(self, url: str, nodes: list[redis.Redis], shards: int, replicas: int) -> None:
        self.nodes, self.settings = nodes, limitless(replicas)
        server = Server(url)
        parts = [Part(number, shards) for number in range(shards)]
        self.shards = [
            Shard(part, server.for_keys(f"sale:{{{part.tag}}}:"), self.settings, lambda: None)
            for part in parts
        ]
        for shard in self.shards:
            shard.client.set(shard.keys.generation, shard.part.generation(SALE))
            figures = dict.fromkeys(COUNTERS, 0) | {"free": 0} | TERMS
            shard.client.hset(shard.keys.product(PRODUCT), mapping=figures)

    def put(self, shard: int, units: int) -> None:
        one = self.shards[shard]
        with one.client.pipeline(transaction=False) as pipe:
            for figure in ("free", "moved"):
                pipe.hincrby(one.keys.product(PRODUCT), figure, units)
            pipe.execute()

    def cpu(self) -> float:
        """Return the µs that the primaries have used."""
        told = [node.info("cpu") for node in self.nodes if node.role()[0] in ("master", b"master")]
        return sum(of["used_cpu_user"] + of["used_cpu_sys"] for of in told) * 1e6

    def scripts(self) -> int:
        """Return how many scripts were run."""
        names = ("cmdstat_eval", "cmdstat_evalsha")
        told = [node.info("commandstats") for node in self.nodes]
        return sum(of[name]["calls"] for of in told for name in names if name in of)


@contextmanager
def sale_of(shards: int, primaries: int, replicas: int) -> Iterator[Sale]:
    with tempfile.TemporaryDirectory(prefix="bench-shards-") as folder:
        servers: list[RedisServer]
        if primaries:
            cluster = Cluster(Path(folder), primaries=primaries, replicas=replicas)
            servers, url = list(cluster.nodes), cluster.url
        else:
            servers, url = [RedisServer(Path(folder))], ""
        try:
            for server in servers:
                server.start()
            if primaries:
                cluster.form()
            nodes = [redis.Redis.from_url(server.url) for server in servers]
            for node in nodes:
                node.config_set("appendfsync", "no")
            yield Sale(url or servers[0].url, nodes, shards, replicas)
        finally:
            for server in servers:
                server.kill()


def claim_cpu(sale: Sale, claims: int, size: int) -> float:
    """Return the µs of the primaries' CPU for one accepted claim."""
    by_shard: defaultdict[int, list[Request]] = defaultdict(list)
    for request in requests(claims):
        by_shard[place(request.user, len(sale.shards)).shard].append(request)
    connections, sent = {}, {}
    for number, shard in enumerate(sale.shards):
        sale.put(number, claims)
        script = ClaimScript(scripts()["claim"], sale.settings, shard.part)
        connections[number] = shard.client.connection_pool.get_connection()
        connections[number].send_packed_command([script.load])
        connections[number].read_response()
        mine = by_shard[number]
        batches = [script.command(*mine[at : at + size]) for at in range(0, len(mine), size)]
        sent[number] = [batch + script.replicas.wait for batch in batches]
    before = sale.cpu()
    accepted = 0
    at_once = IN_FLIGHT // size
    for at in range(0, max(map(len, sent.values())), at_once):
        # All nodes at once, as the lines of one event loop ask them.
        for number, commands in sent.items():
            if some := commands[at : at + at_once]:
                connections[number].send_packed_command(some)
        for number, commands in sent.items():
            for _ in commands[at : at + at_once]:
                accepted += sum(
                    of[0] in (b"accepted", "accepted") for of in connections[number].read_response()
                )
                if sale.settings.redis_replicas:
                    connections[number].read_response()
    used = sale.cpu() - before
    assert accepted == claims, f"{accepted} of {claims} were accepted"
    return used / claims


async def pull_times(sale: Sale, pulls: int) -> tuple[dict[str, list[float]], float, float]:
    """Return ms by what was asked for; and of a pull the scripts and the µs of Redis's CPU."""
    LoopPulls(sale.shards)
    shards = len(sale.shards)
    users = iter(range(10**7, 10**8))
    times: defaultdict[str, list[float]] = defaultdict(list)

    async def ask(name: str, where: int | None) -> None:
        """Claim a unit that lies so many shards from the shopper's, or that nobody has."""
        user = next(users)
        own = place(user, shards).shard
        if where is None:
            carry_out(sale.shards, unseal(shards, PRODUCT))
            await asyncio.sleep(0.11)
        else:
            sale.put((own + where) % shards, 1)
        began = time.perf_counter()
        claim = await sale.shards[own].loop_line.claim(Request(user, PRODUCT, 1, None, "a"))
        times[name].append((time.perf_counter() - began) * 1000)
        assert claim.outcome == (b"sold_out" if where is None else b"accepted"), claim
        # What nobody waits for is done before the next one begins.
        await asyncio.sleep(0.002)

    for _ in range(2 * shards):
        await ask("warm-up", 0)
    for number in range(pulls):
        await ask("its own shard has it", 0)
        if number % 10 == 0:
            await ask("nobody has it", None)
    # Before each pull all shards are unsealed, which is no part of it.
    figures = [(sale.scripts(), sale.cpu())]
    for _ in range(pulls):
        carry_out(sale.shards, unseal(shards, PRODUCT))
    figures.append((sale.scripts(), sale.cpu()))
    for number in range(pulls):
        carry_out(sale.shards, unseal(shards, PRODUCT))
        await ask("another shard has it", 1 + number % (shards - 1))
    figures.append((sale.scripts(), sale.cpu()))
    before, between, after = figures
    ran, used = ((a - 2 * b + c) / pulls for a, b, c in zip(before, between, after, strict=True))
    return dict(times), ran, used


def percentile(values: list[float], part: float) -> float:
    return sorted(values)[min(len(values) - 1, int(part * len(values)))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--claims", type=int, default=20_000)
    parser.add_argument("--size", type=int, default=16, help="claims in a batch (%(default)s)")
    parser.add_argument("--pulls", type=int, default=500)
    options = parser.parse_args()
    found: defaultdict[str, list[float]] = defaultdict(list)
    for _ in range(options.rounds):
        for name, *layout in LAYOUTS:
            with sale_of(*layout) as sale:
                found[name].append(claim_cpu(sale, options.claims, options.size))
    if options.rounds:
        print(f"µs of the primaries' CPU for a claim, {options.size} in a batch; ratio by rounds")
    for name, figures in found.items():
        ratios = [of / one for of, one in zip(figures, found[LAYOUTS[0][0]], strict=True)]
        print(
            f"{name:<32} {statistics.median(figures):6.1f}"
            f"   {statistics.median(ratios):5.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        )
    for name, *layout in PULLED if options.pulls else ():
        with sale_of(*layout) as sale:
            times, ran, cpu = asyncio.run(pull_times(sale, options.pulls))
        print(f"{name}: a pull is {ran:.0f} scripts and {cpu:.0f} µs of the primaries' CPU")
        for what, values in times.items():
            print(
                f"  {what:<22} median {percentile(values, 0.5):6.2f} ms,"
                f" p99 {percentile(values, 0.99):6.2f}, at most {max(values):6.2f}"
            )


if __name__ == "__main__":
    main()
