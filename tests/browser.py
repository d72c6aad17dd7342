"""What the tests in a real browser share: the browser, an admin signed in, a shop beside them."""

import itertools
import os
import shutil

import pytest
from call import call

# The first is the same engine without a window's trappings: a page costs a third of the time.
NAMES = ("chromium-headless-shell", "chromium", "chromium-browser")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
EMAIL = "admin@example.com"
PAGES = (
    "/admin/", "/admin/products/", "/admin/products/1", "/admin/products/1/edit",
    "/admin/products/new", "/admin/products/import", "/admin/orders/", "/admin/dead-letters/",
    "/admin/ledger/", "/admin/bulk-cancels/", "/admin/bulk-cancels/new?product=1",
    "/admin/staff/", "/admin/audit/", "/admin/password", "/admin/rq/", "/admin/rq/0/view/jobs",
    "/admin/rq/0/view/workers",
)  # fmt: skip
# Long enough for a machine that is busy with other things; who waits for less is not waiting.
SEEN_MS = 20_000
users = itertools.count(500_000)


@pytest.fixture(scope="module")
def chromium():
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        sync_playwright = None
    if not CHROMIUM or not sync_playwright:
        missing = "chromium" if sync_playwright else "the package playwright"
        message = f"no browser tests: {missing} is not installed"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def signed_in(chromium, server) -> dict:
    """The cookies of an admin who has signed in by the form."""
    context = chromium.new_context(base_url=server.url)
    page = context.new_page()
    page.goto("/admin/orders/?q=7")
    assert page.url.endswith("/admin/sign-in?next=/admin/orders/?q%3D7")
    page.fill("#email", EMAIL)
    page.fill("#password", "surely not this one")
    page.keyboard.press("Enter")
    page.get_by_text("do not match").wait_for()
    page.fill("#password", server.admin_password)
    page.keyboard.press("Enter")
    page.wait_for_url("**/admin/orders/?q=7")
    state = context.storage_state()
    context.close()
    return state


def complains(line) -> bool:
    """Of what went wrong; htmx also tells of each poll that ends because its page is left."""
    left = line.text.startswith(("htmx:afterRequest,", "htmx:sendAbort,"))
    return line.type == "error" and not left


@pytest.fixture
def open_page(chromium, server, signed_in):
    """Open a page for a signed-in admin; at the end it must not have complained of anything."""
    contexts, complaints = [], []

    def open_one(path: str, **options):
        complain = options.pop("complain", True)
        options = {"storage_state": signed_in, "base_url": server.url} | options
        context = chromium.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(SEEN_MS)
        if complain:
            page.on(
                "console",
                lambda line: complaints.append(line.text) if complains(line) else None,
            )
            page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(path)
        return page

    yield open_one
    for context in contexts:
        context.close()
    assert not complaints


class Shop:
    """What a test does beside the browser."""

    def __init__(self, server) -> None:
        self.url = server.url
        self.headers = {"Authorization": f"Bearer {server.api_token}"}

    def product(self, **terms) -> int:
        body = {"name": "Lamp", "priceCents": 1990, "currency": "EUR", "stock": 100} | terms
        return call(f"{self.url}/products", body, headers=self.headers).json["id"]

    def show(self, product_id: int) -> dict:
        return call(f"{self.url}/products/{product_id}").json

    def buy(self, product_id: int, user_id: int | None = None, quantity: int = 1):
        body = {"userId": user_id or next(users), "productId": product_id, "quantity": quantity}
        return call(f"{self.url}/purchase", body)


@pytest.fixture
def shop(server) -> Shop:
    return Shop(server)
