"""Measure the system, the web server's ceiling, and a peer of the usual design, in one run.

    python stress/bench.py [--rounds 3] [--seconds 8] [--no-peer] [--quick]

Starts everything itself in a scratch directory, one system at a time and in turn, so that a change
of the machine's speed hits all of them. Load comes from wrk, on loopback only. A run counts only
when what was sold, stored and taken from the stock agree. Writes the tables and the plot into
docs/performance.md; --quick does all of it once and small, and prints the tables only.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "stress")]

import bench_claim
from bench_growth import growth_figures
from bench_report import tables, write_report
from client import sign_in
from systems import (
    CONNECTIONS,
    EXPRESS,
    STOCK,
    Broken,
    ExpressPeer,
    GoPeer,
    Ours,
    Users,
    cpu_seconds,
    has_go,
    noop,
    per_order,
    until,
    wrk,
)

MANY, CROWD = 256, 1000
# The limit is on, and counts, but one machine's load does not meet it.
HIGH_LIMIT = "10000000/minute"


def sold_since(earlier: dict, now: dict) -> int:
    return earlier["stock_remaining"] - now["stock_remaining"]


def stored_since(earlier: dict, now: dict) -> int:
    return now["total_processed"] - earlier["total_processed"]


def sell(system, product: int, base: int, seconds: float, connections: int = CONNECTIONS) -> dict:
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
        figures = wrk(
            "buy.lua",
            f"{system.url}/purchase",
            base,
            product,
            seconds=seconds,
            connections=connections,
        )
        sold_seconds = figures["duration_us"] / 1e6
        # The last purchases are decided after their connections have ended, and counted one by one.
        drained = until(
            lambda: (
                (now := system.metrics(product))["queue_depth"] == 0
                and sold_since(earlier, now) == stored_since(earlier, now)
                and now
            ),
            180,
            f"{system.name} to store what was sold",
        )
        all_seconds = time.monotonic() - started
    finally:
        stopped.set()
        watcher.join()
    after = cpu_seconds(system.roots)
    sold = sold_since(earlier, drained)
    if not figures["ok"] <= sold <= figures["ok"] + connections or figures["refused"]:
        raise Broken(f"{system.name}: {figures['ok']} answered, {sold} sold")
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
    before = cpu_seconds(system.roots)
    sold_out = wrk("buy.lua", url, users.next(), product, seconds=seconds)
    sold_out["cpu"] = per_order(before, cpu_seconds(system.roots), sold_out["requests"])
    limited = wrk("limited.lua", url, users.next(), 50, product, seconds=seconds)
    if sold_out["ok"] or limited["ok"] > 50 * 5:
        raise Broken(f"{system.name}: sold what it had not")
    return {"sold_out": sold_out, "limited": limited}


def round_of_ours(
    folder: Path, port: int, users: Users, seconds: float, address_limit: str = "off"
) -> dict:
    with Ours(folder, port, PURCHASE_ADDRESS_LIMIT=address_limit).running() as system:
        wrk("buy.lua", f"{system.url}/purchase", users.next(), system.product(STOCK), seconds=1)
        result = sell(system, system.product(STOCK), users.next(), seconds)
        result["many"] = sell(system, system.product(STOCK), users.next(), seconds / 2, MANY)
        return result | refuse(system, system.product(0), users, seconds / 2)


def round_of_peer(peer: ExpressPeer | GoPeer, users: Users, seconds: float) -> dict:
    with peer.running(STOCK):
        # Node compiles what is hot: a cold start would wrong it. One user can take five units.
        wrk("limited.lua", f"{peer.url}/purchase", users.next(), 1, 1, seconds=2)
        result = sell(peer, 1, users.next(), seconds)
        result["many"] = sell(peer, 1, users.next(), seconds / 2, MANY)
    with peer.running(0):
        wrk("limited.lua", f"{peer.url}/purchase", users.next(), 1, 1, seconds=1)
        return result | refuse(peer, 1, users, seconds / 2)


def peers(folder: Path, port: int, with_peer: bool) -> dict[str, ExpressPeer | GoPeer]:
    """Return what this machine can compare with, by the names of bench_report.py."""
    if not with_peer:
        return {}
    found: dict[str, ExpressPeer | GoPeer] = {
        f"peer{processes}": ExpressPeer(folder / f"peer{processes}", port, processes)
        for processes in (1, 2)
    }
    if has_go():
        found["go"] = GoPeer(folder / "go", port, fsync=True)
        found["go_weak"] = GoPeer(folder / "go_weak", port, fsync=False)
    return found


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


def dashboards_figures(system: Ours, product: int, users: Users, turns: int) -> list[dict]:
    """Compare purchases without and with 20 open dashboards of 50 products, by turns."""
    while len(system.api.read("/products")) < 50:
        system.product(100)
    password = (system.folder / "admin_password").read_text().strip()
    # The session belongs to one kind of browser.
    cookie, pairs = sign_in(system.url, password, agent="dashboards.lua"), []
    for _ in range(turns):
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


def single_figures(folder: Path, port: int, users: Users, backlog: int, turns: int) -> dict:
    """Measure what needs no comparison: idle latency, a crowd's, a backlog's drain."""
    found = {}
    with Ours(folder, port).running() as system:
        product, url = system.product(STOCK), f"{system.url}/purchase"
        found["idle"] = wrk("buy.lua", url, users.next(), product, seconds=4, connections=1)
        found["crowd"] = wrk("buy.lua", url, users.next(), product, seconds=4, connections=CROWD)
        worker = system.pid_of("worker")
        os.kill(worker, signal.SIGSTOP)
        try:
            while system.metrics(product)["queue_depth"] < backlog:
                wrk("buy.lua", url, users.next(), product, seconds=3)
                # It says that it lives, or the supervisor puts another one into its place.
                os.kill(worker, signal.SIGCONT)
                time.sleep(0.1)
                os.kill(worker, signal.SIGSTOP)
        finally:
            waiting = system.metrics(product)["queue_depth"]
            os.kill(worker, signal.SIGCONT)
        started = time.monotonic()
        until(lambda: system.metrics(product)["queue_depth"] == 0, 120, "the backlog")
        found["backlog"] = {"orders": waiting, "rate": waiting / (time.monotonic() - started)}
        found["dashboards"] = dashboards_figures(system, product, users, turns)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8)
    parser.add_argument("--port", type=int, default=8700)
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--no-growth", action="store_true")
    parser.add_argument("--quick", action="store_true", help="small; no report")
    wanted = parser.parse_args()
    if not shutil.which("wrk"):
        print("wrk is not installed: apt-get install wrk", file=sys.stderr)
        return 2
    with_peer = not (wanted.no_peer or wanted.quick)
    if with_peer and not (shutil.which("node") and shutil.which("npm")):
        print("node and npm are not installed; --no-peer does without them", file=sys.stderr)
        return 2
    if with_peer and not (EXPRESS / "node_modules").exists():
        subprocess.run(["npm", "ci", "--silent"], cwd=EXPRESS, check=True)
    if with_peer and not has_go():
        print("no Go peer: apt-get install golang-go golang-github-gomodule-redigo-dev")
    if wanted.quick:
        wanted.rounds, wanted.seconds = 1, 2
    # Claims, orders waiting, turns of dashboards, orders of a grown sale.
    sizes = (640, 1000, 1, 2000) if wanted.quick else (20_000, 100_000, 5, 1_000_000)
    claim_count, backlog, turns, grown = sizes
    users, rounds = Users(), []
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        folder = Path(scratch)
        try:
            for number in range(1, wanted.rounds + 1):
                print(f"round {number}", flush=True)
                results = {
                    "ours": round_of_ours(folder / "ours", wanted.port, users, wanted.seconds)
                }
                print(f"  ours {results['ours']['rate']:,.0f}/s", flush=True)
                with noop(wanted.port + 1) as url:
                    results["noop"] = wrk("buy.lua", url, 10**9, 1, seconds=wanted.seconds / 2)
                print(f"  no-op {results['noop']['rate']:,.0f}/s", flush=True)
                results["ours_limited"] = round_of_ours(
                    folder / "ours", wanted.port, users, wanted.seconds, HIGH_LIMIT
                )
                print(f"  address limit on {results['ours_limited']['rate']:,.0f}/s", flush=True)
                for name, peer in peers(folder, wanted.port + 2, with_peer).items():
                    results[name] = round_of_peer(peer, users, wanted.seconds)
                    print(f"  {name} {results[name]['rate']:,.0f}/s", flush=True)
                rounds.append(results)
            claims = {fsync: bench_claim.figures(claim_count, fsync) for fsync in ("no", "always")}
            single = single_figures(folder / "ours", wanted.port, users, backlog, turns)
            growth = None
            if not wanted.no_growth:
                growth = growth_figures(folder / "growth", wanted.port, users, grown)
        except Broken as error:
            print(f"the run does not count: {error}", file=sys.stderr)
            return 1
    if wanted.quick:
        print(tables(rounds, single, growth, claims, wanted.seconds))
    else:
        write_report(rounds, single, growth, claims, wanted.seconds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
