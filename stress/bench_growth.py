"""Whether many orders make anything slower: the same figures before and after."""

import json
import os
import random
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import psutil
from client import sign_in_form
from systems import ROOT, STOCK, Ours, Users, cpu_seconds, per_order, until, wrk

PRODUCTS = 50
SAMPLES = 60


def median_ms(action: Callable[[], object]) -> float:
    """Return the median time of an action, in milliseconds."""
    times = []
    for _ in range(SAMPLES):
        started = time.perf_counter()
        action()
        times.append((time.perf_counter() - started) * 1000)
    return statistics.median(times)


def figures(folder: Path, port: int, users: Users) -> tuple[dict[str, float], float]:
    """Return the figures with these orders, and how long a new web server took to answer."""
    with Ours(folder, port).running() as system:
        product = system.product(STOCK)
        url = f"{system.url}/purchase"
        wrk("buy.lua", url, users.next(), product, seconds=1)
        until(lambda: system.metrics(product)["queue_depth"] == 0, 60, "the drain")
        before = cpu_seconds(system.roots)
        sold_before = system.metrics(product)["total_processed"]
        wrk("buy.lua", url, users.next(), product, seconds=5)
        until(lambda: system.metrics(product)["queue_depth"] == 0, 60, "the drain")
        sold = system.metrics(product)["total_processed"] - sold_before
        cpu = per_order(before, cpu_seconds(system.roots), sold)
        pages = _in_process(folder)
        # Its supervisor starts the web server again; what counts is the first answer.
        server = psutil.Process(system.pid_of("web"))
        for process in [server, *server.children(recursive=True)]:
            process.kill()
        started = time.monotonic()
        until(lambda: _answers(system.url), 30, "the web server")
        return {"CPU per purchase, µs": sum(cpu.values()), **pages}, time.monotonic() - started


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/healthz", timeout=1) as answer:
            return answer.status == 200
    except OSError:
        return False


def _in_process(folder: Path) -> dict[str, float]:
    """Measure server time without the network: a test client, in a process of its own."""
    output = subprocess.run(
        [sys.executable, __file__],
        cwd=ROOT,
        env=os.environ | {"DATA_DIR": str(folder)},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout
    return json.loads(output.splitlines()[-1])


def growth_figures(folder: Path, port: int, users: Users, orders: int) -> dict:
    """Return the pairs (small, large) of figures, and how soon a start answers with `orders`."""
    with Ours(folder, port).running():
        _generate(folder, 1000, PRODUCTS)
    small, _ = figures(folder, port, users)
    with Ours(folder, port).running():
        _generate(folder, orders, 1)
    large, start = figures(folder, port, users)
    return {"pairs": {name: (small[name], large[name]) for name in small}, "start_seconds": start}


def _generate(folder: Path, orders: int, products: int) -> None:
    command = [sys.executable, "stress/generate.py", "--orders", str(orders)]
    subprocess.run(
        [*command, "--products", str(products)],
        cwd=ROOT,
        env=os.environ | {"DATA_DIR": str(folder)},
        check=True,
        stdout=subprocess.DEVNULL,
    )


def main() -> None:
    """Print the figures of the pages as JSON; run by `_in_process`."""
    from app.extensions import db, limiter
    from wsgi import app

    limiter.enabled = False
    client = app.test_client()
    with app.app_context():
        query = db.text("SELECT user_id FROM orders LIMIT 500")
        users = list(db.session.scalars(query))
    password = Path(os.environ["DATA_DIR"], "admin_password").read_text().strip()
    form = sign_in_form(client.get("/admin/sign-in").text, password)
    assert client.post("/admin/sign-in", data=form).status_code == 302

    def fragment() -> None:
        assert client.get("/admin/live").status_code == 200

    def lookup() -> None:
        assert client.get(f"/purchase/orders/{random.choice(users)}").status_code == 200

    def search() -> None:
        assert client.get(f"/admin/orders/?q={random.choice(users)}").status_code == 200

    found = {}
    for name, action in (
        ("dashboard fragment, ms", fragment),
        ("look-up of a shopper's orders, ms", lookup),
        ("order search on the support page, ms", search),
    ):
        action()
        found[name] = median_ms(action)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
