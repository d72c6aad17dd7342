"""Make the screenshots of the documentation: every page, light and dark, wide and narrow.

Starts a system of its own on a free port, runs a small sale in it, and takes the pictures while
purchases go on. The chart's first minutes are drawn up beforehand, so that nobody waits for them.

    python stress/screenshots.py [--to docs/screenshots] [--only dashboard,orders]
"""

import argparse
import json
import math
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import redis
from PIL import Image
from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from app.config import load_settings, with_secrets
from app.run.embedded import embedded_servers
from app.stock.keys import KEYS

CHROMIUM = shutil.which("chromium-headless-shell") or shutil.which("chromium")
WIDTHS = {"wide": (1440, 900), "narrow": (360, 780)}
HISTORY_SECONDS = 860
MINUTE = timedelta(minutes=1)


class Consumer(BaseHTTPRequestHandler):
    """Takes every webhook."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


class Shop:
    """A running system, and a handful of things to do with it."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        environ = {
            **os.environ,
            "DATA_DIR": str(folder),
            "PORT": str(port),
            "PURCHASE_ADDRESS_LIMIT": "off",
            "WEB_WORKERS": "1",
            "WEBHOOK_ALLOW_PRIVATE": "on",
        }
        self.url = f"http://127.0.0.1:{port}"
        self.log = folder / "system.log"
        with self.log.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "app.run.supervisor"],
                cwd=ROOT,
                env=environ,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        deadline = time.monotonic() + 90
        while "Ready:" not in self.log.read_text():
            if self.process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"the system did not start:\n{self.log.read_text()}")
            time.sleep(0.1)
        settings = with_secrets(load_settings({"DATA_DIR": str(folder)}))
        self.email, self.password = settings.admin_email, settings.admin_password
        self.token = settings.admin_api_token
        url = embedded_servers(settings)["redis_url"].url
        self.redis = redis.Redis.from_url(url, decode_responses=True)

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(timeout=40)

    def ask(self, method: str, path: str, body: dict, **headers: str) -> dict:
        request = urllib.request.Request(
            self.url + path,
            json.dumps(body).encode(),
            {
                "Content-Type": "application/json",
                "Authorization": f"Bearer {self.token}",
                **{name.replace("_", "-"): value for name, value in headers.items()},
            },
            method=method,
        )
        try:
            with urllib.request.urlopen(request) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            return json.load(error)

    def buy(self, product: int, user: int, quantity: int = 1, **headers: str) -> dict:
        body = {"userId": user, "productId": product, "quantity": quantity}
        return self.ask("POST", "/purchase", body, **headers)


def iso(moment: datetime) -> str:
    return moment.isoformat(timespec="seconds")


def fill(shop: Shop, consumer: str) -> None:
    """Products in every state, orders, a dead letter, webhooks, and some history."""
    now = datetime.now(UTC)
    shop.ask("POST", "/webhooks", {"url": consumer})
    # Nothing listens there.
    shop.ask("POST", "/webhooks", {"url": "http://127.0.0.1:9/stock"})
    shop.ask("PATCH", "/products/1", {"name": "Aurora 14 laptop, 32 GB", "priceCents": 129_900})
    products = [
        {"name": "Nimbus headphones", "priceCents": 24_900, "stock": 2500,
         "closesAt": iso(now + 47 * MINUTE), "perUserLimit": 4},
        {"name": "Vertex GPU, founders edition", "priceCents": 189_900, "stock": 60,
         "perUserLimit": 1, "maxQuantity": 1},
        {"name": "Orbit smartwatch", "priceCents": 39_900, "stock": 800, "holdSeconds": 3600},
        {"name": "Halo drone with 4K camera", "priceCents": 74_900, "stock": 300,
         "opensAt": iso(now + 26 * MINUTE), "closesAt": iso(now + 146 * MINUTE)},
        {"name": "Lumen desk lamp", "priceCents": 8_950, "stock": 150},
    ]  # fmt: skip
    for product in products:
        shop.ask("POST", "/products", {"currency": "USD", **product})
    shop.ask(
        "POST", "/products/restock", {"productId": 1, "amount": 900, "reason": "Second delivery"}
    )
    shop.ask("POST", "/products/restock", {"productId": 4, "amount": 200, "reason": "Returned lot"})
    for user in range(1, 80):
        shop.buy(3, user)
    for user in range(100, 420):
        shop.buy(random.choice((1, 1, 2, 2, 4, 6)), user, random.choice((1, 1, 1, 2, 3)))
    # The same key again, after Redis has forgotten it: PostgreSQL refuses, and a person decides.
    for user, key in ((7001, "checkout-5f31"), (7002, "checkout-9ac2")):
        shop.buy(2, user, 2, Idempotency_Key=key)
        time.sleep(1)
        shop.redis.hdel(*KEYS.idempotency(user, key))
        shop.buy(2, user, 2, Idempotency_Key=key)
    shop.ask("PATCH", "/products/4", {"paused": True})
    shop.ask("PATCH", "/products/6", {"closesAt": iso(datetime.now(UTC))})
    time.sleep(2)
    draw_history(shop)


def draw_history(shop: Shop) -> None:
    """Put samples of a plausible quarter of an hour before the ones that are really there."""
    samples = shop.redis.xrange(KEYS.history)
    newest = json.loads(samples[-1][1]["sample"])
    end = int(samples[-1][0].partition("-")[0])
    figures = dict(newest)
    past = []
    for age in range(HISTORY_SECONDS):
        past.append((end - age, dict(figures)))
        at = HISTORY_SECONDS - age
        rush = 22 * math.exp(-(((at - 420) / 130) ** 2)) + 12 * math.exp(-(((at - 720) / 40) ** 2))
        sold = max(0, int(random.gauss(4 + rush, 1.6)))
        figures["accepted"] -= sold
        figures["persisted"] -= sold
        figures["free"] += int(sold * 1.25) - (900 if age == 500 else 0)
        figures["sold_out"] -= max(0, int(random.gauss(rush * 0.4, 1)))
        figures["limited"] -= max(0, int(random.gauss(2 + rush * 0.12, 1)))
        waiting = 0.7 * figures["waiting"] + random.gauss(rush * 0.12, 0.7)
        figures["waiting"] = max(0, round(waiting))
    with shop.redis.pipeline() as pipe:
        pipe.delete(KEYS.history)
        for second, sample in reversed(past):
            pipe.xadd(KEYS.history, {"sample": json.dumps(sample)}, id=f"{second}-1")
        pipe.execute()


def shop_on(shop: Shop, stopped: threading.Event) -> None:
    """Go on buying, so that the pictures are of a sale that runs."""
    user = 10_000
    while not stopped.is_set():
        for _ in range(random.randint(1, 4)):
            user += 1
            shop.buy(random.choice((1, 1, 2, 2, 3)), user, random.choice((1, 1, 2)))
        for _ in range(2):
            shop.buy(1, 9_999)
        stopped.wait(0.08)


def prepare_pages(shop: Shop, page: Page) -> dict[str, str]:
    """Do as an admin would, and return the pages by the name of their picture."""
    page.goto(f"{shop.url}/admin/sign-in")
    page.fill("#email", shop.email)
    page.fill("#password", shop.password)
    page.click("text=Sign in >> nth=-1")
    page.wait_for_url("**/admin/")
    page.goto(f"{shop.url}/admin/orders/3")
    page.fill("#f-reason", "Ordered by mistake, ticket 4711")
    page.click("text=Cancel order")
    page.click("#confirm [value=yes]")
    page.wait_for_selector("text=back in stock")
    page.goto(f"{shop.url}/admin/staff/")
    for email in ("mira@example.com", "jonas@example.com"):
        page.fill("#f-email", email)
        page.click("button:has-text('Add')")
        page.wait_for_selector("#secret")
    page.fill("#f-name", "checkout")
    page.check("[name=scope][value='orders:read']")
    page.click("button:has-text('Create token')")
    page.wait_for_selector("text=The token checkout")
    return {
        "dashboard": "/admin/",
        "products": "/admin/products/",
        "product": "/admin/products/1",
        "product-form": "/admin/products/2/edit",
        "orders": "/admin/orders/",
        "order": "/admin/orders/3",
        "dead-letters": "/admin/dead-letters/",
        "dead-letters-review": "/admin/dead-letters/review?id=1&id=2",
        "ledger": "/admin/ledger/",
        "staff": "/admin/staff/",
        "audit": "/admin/audit/",
        "password": "/admin/password",
        "jobs": "/admin/rq/",
        "webhooks": "/admin/webhooks/",
        "webhook": "/admin/webhooks/1",
        "import": "/admin/products/import",
    }


def shrink(file: Path) -> None:
    """Keep the 256 commonest colours as they are, and the nearest of them for the others.

    Letters have more shades of grey than that, and a state's dot is small: some bright ones stay.
    """
    picture = Image.open(file).convert("RGB")
    colours = [colour for _, colour in sorted(picture.getcolors(2**24), reverse=True)]
    bright = [colour for colour in colours if max(colour) - min(colour) > 64]
    kept = list(dict.fromkeys([*bright[:64], *colours]))[:256]
    palette = Image.new("P", (1, 1))
    palette.putpalette([part for colour in kept for part in colour])
    picture.quantize(palette=palette, dither=Image.Dither.NONE).save(file, optimize=True)


def take(shop: Shop, target: Path, only: set[str]) -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--lang=en-GB"]
        )
        context = browser.new_context(viewport={"width": 1440, "height": 900})
        first = context.new_page()
        pages = prepare_pages(shop, first)
        cookies = context.storage_state()
        for theme in ("light", "dark"):
            for size, (width, height) in WIDTHS.items():
                options = {
                    "viewport": {"width": width, "height": height},
                    "color_scheme": theme,
                    "locale": "en-GB",
                    "timezone_id": "Europe/Berlin",
                }
                signed_in = browser.new_context(storage_state=cookies, **options)
                anonymous = browser.new_context(**options)
                shots = {"sign-in": "/admin/sign-in", "shop": "/shop"} | pages
                for name, path in shots.items():
                    if only and name not in only:
                        continue
                    page = (anonymous if name in ("sign-in", "shop") else signed_in).new_page()
                    page.goto(shop.url + path)
                    page.wait_for_load_state("networkidle" if name == "jobs" else "load")
                    page.wait_for_timeout(1600 if name == "dashboard" else 500)
                    page.evaluate("document.activeElement?.blur()")
                    file = target / f"{name}-{size}-{theme}.png"
                    page.screenshot(path=file, full_page=name in ("dashboard", "product"))
                    # The README's own picture is left as it is.
                    if (name, size) != ("dashboard", "wide"):
                        shrink(file)
                    print(f"{file.name:34} {file.stat().st_size / 1024:6.0f} kB")
                    page.close()
                signed_in.close()
                anonymous.close()
        browser.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--to", type=Path, default=ROOT / "docs" / "screenshots")
    parser.add_argument("--only", default="", help="names of pages, with commas between")
    arguments = parser.parse_args()
    arguments.to.mkdir(parents=True, exist_ok=True)
    random.seed(4711)
    with tempfile.TemporaryDirectory(prefix="shots") as folder:
        consumer = ThreadingHTTPServer(("127.0.0.1", 0), Consumer)
        threading.Thread(target=consumer.serve_forever, daemon=True).start()
        shop = Shop(Path(folder))
        stopped = threading.Event()
        buyer = threading.Thread(target=shop_on, args=(shop, stopped))
        try:
            fill(shop, f"http://127.0.0.1:{consumer.server_port}/events")
            buyer.start()
            take(shop, arguments.to, set(filter(None, arguments.only.split(","))))
        finally:
            stopped.set()
            if buyer.ident:
                buyer.join()
            shop.stop()


if __name__ == "__main__":
    main()
