"""The pages in a real browser, on the whole running system, while somebody buys.

Every page must be free of console errors and of violations of the Content-Security-Policy: the
fixture `open_page` looks for them when a test ends.
"""

import contextlib
import threading
import time
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import psycopg2
import pytest
from browser import PAGES, users
from drills import drill
from waiting import patience

from app.config import load_settings
from app.locks import DRAIN_LOCK
from app.run.embedded import embedded_servers


@pytest.fixture
def drain_held(server):
    """Hold the drain's lock, so that orders stay queued until `release()`."""
    settings = load_settings({"DATA_DIR": str(server.data_dir)})
    url = embedded_servers(settings)["database_url"].url.replace("+psycopg2", "")
    connection = psycopg2.connect(url)
    connection.autocommit = True
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_advisory_lock(%s)", [DRAIN_LOCK])
    yield connection.close
    connection.close()


def free_of(page, product_id: int) -> int:
    return int(page.inner_text(f"#product-{product_id} [data-free]").replace(",", ""))


def wait_for_free(page, product_id: int, units: int) -> None:
    page.wait_for_function(
        "([id, units]) => document.querySelector(`#product-${id} [data-free]`)?.textContent"
        ".replace(',', '') === String(units)",
        arg=[product_id, units],
    )


@pytest.mark.drill
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_no_page_complains_or_is_too_wide(open_page, shop, theme):
    shop.product(name="A product with quite a long name, as marketing people like them")
    page = open_page(PAGES[0], color_scheme=theme, viewport={"width": 360, "height": 740})
    for path in PAGES:
        page.goto(path)
        page.wait_for_load_state("networkidle" if "/rq/" in path else "load")
        assert page.evaluate("document.documentElement.dataset.bsTheme") == theme
        wide = page.evaluate("document.documentElement.scrollWidth")
        assert wide <= 360, f"{path} is {wide} px wide"
        foreign = page.evaluate(
            "performance.getEntriesByType('resource').map(e => new URL(e.name).origin)"
            ".filter(o => o !== location.origin)"
        )
        assert not foreign, path


def test_stock_falls_while_purchases_run(open_page, shop):
    product = shop.product(stock=500)
    page = open_page("/admin/")
    stopped = threading.Event()

    def buy_on():
        while not stopped.wait(0.02):
            shop.buy(product)

    buyer = threading.Thread(target=buy_on)
    buyer.start()
    try:
        page.click(f"#restock-open-{product}")
        page.fill(f"#amount-{product}", "12")
        page.evaluate("scrollTo(0, 40)")
        seen = set()
        deadline = time.monotonic() + patience(6)
        while len(seen) < 4 and time.monotonic() < deadline:
            seen.add(free_of(page, product))
            page.wait_for_timeout(200)
        assert len(seen) >= 4, "the stock did not fall before our eyes"
        assert min(seen) < 500
        # What a person was doing has survived the updates.
        assert page.input_value(f"#amount-{product}") == "12"
        assert page.evaluate("document.activeElement.id") == f"amount-{product}"
        assert page.evaluate("scrollY") == 40
        # A restock in the middle of it shows at once, and nothing bought meanwhile is forgotten.
        before = free_of(page, product)
        page.fill(f"#amount-{product}", "1000")
        page.fill(f"#reason-{product}", "second delivery")
        page.click(f"#restock-form-{product} button")
        page.get_by_text("1,000 units added").wait_for()
        # No older answer comes after it.
        for _ in range(12):
            assert before + 1000 - 300 < free_of(page, product) <= before + 1000
            page.wait_for_timeout(100)
    finally:
        stopped.set()
        buyer.join()
    wait_for_free(page, product, shop.show(product)["stockRemaining"])


def test_pause_binds_the_next_purchase(open_page, shop):
    product = shop.product()
    page = open_page(f"/admin/products/{product}")
    page.get_by_role("button", name="Pause").click()
    page.get_by_text("Lamp is paused.").wait_for()
    assert shop.buy(product).json["code"] == "paused"
    page.get_by_role("button", name="Resume").click()
    page.get_by_text("Lamp is on sale again.").wait_for()
    assert shop.buy(product).status == 200
    # Ending asks first, and "no" is no.
    for answer, status in (("no", 200), ("yes", 409)):
        page.locator(f"#menu-{product} summary").click()
        page.get_by_role("button", name="End sale").click()
        page.click(f"#confirm [value={answer}]")
        if answer == "yes":
            page.get_by_text("Lamp is ended.").wait_for()
        assert shop.buy(product).status == status


def test_an_order_from_queued_to_cancelled(open_page, shop, drain_held):
    product, user = shop.product(), next(users)
    order = shop.buy(product, user, quantity=3).json["orderId"]
    page = open_page("/admin/orders/")
    page.fill("#q", str(user))
    page.wait_for_url(f"**/orders/?q={user}*")
    row = page.locator("#results tbody tr")
    assert row.count() == 1
    assert "Queued" in row.inner_text()
    row.get_by_role("link", name=f"#{order}").click()
    page.get_by_text("Waiting to be stored").wait_for()
    drain_held()
    page.get_by_text("Persisted").wait_for()
    assert shop.show(product)["stockRemaining"] == 97
    page.fill("#f-reason", "ordered by mistake")
    page.get_by_role("button", name="Cancel order").click()
    page.click("#confirm [value=yes]")
    page.get_by_text("3 units back in stock").wait_for()
    assert page.get_by_text("Cancelled by staff admin@example.com").count() == 1
    assert shop.show(product)["stockRemaining"] == 100


def test_export(open_page, shop):
    product, user = shop.product(), next(users)
    shop.buy(product, user)
    page = open_page("/admin/orders/")
    page.fill("#q", str(user))
    page.wait_for_url(f"**/orders/?q={user}*")
    with page.expect_download() as download:
        page.get_by_role("link", name="Export CSV").click()
    lines = download.value.path().read_text().splitlines()
    assert len(lines) == 2
    assert f",{user},{product},Lamp,1,19.90,EUR,19.90," in lines[1]


def test_support_is_kept_out(open_page, chromium, server):
    page = open_page("/admin/staff/")
    page.fill("#f-email", f"support{next(users)}@example.com")
    email = page.input_value("#f-email")
    page.get_by_role("button", name="Add", exact=True).click()
    password = page.inner_text("#secret")
    page = open_page("/admin/", storage_state=None, complain=False)
    page.fill("#email", email)
    page.fill("#password", password)
    page.keyboard.press("Enter")
    page.wait_for_url("**/admin/")
    page.locator("#board .tiles").wait_for()
    assert page.get_by_role("button", name="Pause").count() == 0
    assert page.get_by_role("link", name="Staff and tokens").count() == 0
    assert page.goto("/admin/staff/").status == 403
    assert page.goto("/admin/rq/").status == 403
    assert page.goto("/admin/orders/").status == 200


def test_an_expired_session_leads_to_the_sign_in_page(open_page):
    from playwright import sync_api

    page = open_page("/admin/", complain=False)
    # An answer under way may bring the cookie back: then it is taken away again.
    for _ in range(5):
        page.context.clear_cookies()
        with contextlib.suppress(sync_api.TimeoutError):
            page.wait_for_url("**/admin/sign-in?next=/admin/", timeout=4000)
            break
    assert "/admin/sign-in" in page.url
    assert page.locator("#board").count() == 0


def test_away_and_back(open_page):
    page = open_page("/admin/", complain=False)
    page.context.set_offline(True)
    page.get_by_text("The server can’t be reached.").wait_for()
    page.context.set_offline(False)
    page.locator("#offline").wait_for(state="hidden")


def test_a_hidden_tab_asks_nothing(open_page):
    page = open_page("/admin/")
    page.wait_for_timeout(500)
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.evaluate(
        "Object.defineProperty(document, 'hidden', {get: () => true, configurable: true})"
    )
    page.wait_for_timeout(400)
    asked.clear()
    page.wait_for_timeout(2200)
    assert asked == []
    page.evaluate("delete document.hidden; document.dispatchEvent(new Event('visibilitychange'))")
    page.wait_for_timeout(300)
    assert asked


def test_the_chart_survives_a_reload(open_page):
    page = open_page("/admin/")
    for _ in range(2):
        page.locator("#chart-traffic canvas").wait_for()
        page.locator("#chart-stock canvas").wait_for()
        samples = page.evaluate(
            "fetch('/admin/chart.json').then(a => a.json()).then(c => c.second.length)"
        )
        assert samples > 1
        page.reload()
    # It is drawn anew in the other colours, not lost.
    page.locator("[data-theme=dark]").click()
    page.locator("#chart-traffic canvas").wait_for()


def test_times_are_the_browsers(open_page, shop):
    page = open_page("/admin/products/new", timezone_id="Asia/Kolkata")
    page.fill("#f-name", "In Kolkata")
    page.fill("#f-price", "5")
    page.fill("#f-stock", "3")
    page.fill("#f-opens", "2031-01-01T09:00:00")
    assert page.inner_text("#utc-opens") == "2031-01-01 03:30:00 UTC"
    page.get_by_role("button", name="Create product").click()
    page.wait_for_url("**/admin/products/*")
    product = int(page.url.rpartition("/")[2])
    assert shop.show(product)["opensAt"] == "2031-01-01T03:30:00.000Z"
    assert "9:00:00" in page.inner_text(".facts")
    assert "03:30:00 UTC" in page.inner_text(".facts")
    page.goto(f"/admin/products/{product}/edit")
    assert page.input_value("#f-opens").startswith("2031-01-01T09:00")


@pytest.mark.parametrize(
    ("zone", "instant", "wall"),
    [
        # The second of the two half past ones of that night.
        ("America/New_York", "2027-11-07T06:30:00.123456Z", "2027-11-07T01:30"),
        drill("Europe/Berlin", "2027-10-31T01:30:15.000001Z", "2027-10-31T02:30:15"),
        drill("Asia/Kathmandu", "2031-01-01T00:00:59.999Z", "2031-01-01T05:45:59"),
    ],
)
def test_a_time_that_nobody_touched_stays(open_page, shop, zone, instant, wall):
    product = shop.product(closesAt=instant)
    known = shop.show(product)["closesAt"]
    page = open_page(f"/admin/products/{product}/edit", timezone_id=zone)
    assert page.input_value("#f-closes").startswith(wall)
    assert page.inner_text("#utc-closes").startswith(instant[:19].replace("T", " "))
    page.fill("#f-name", "Renamed")
    # Typed and taken back is not touched either.
    page.fill("#f-closes", "2032-01-01T00:00")
    page.fill("#f-closes", wall)
    page.get_by_role("button", name="Save terms").click()
    page.get_by_text("Renamed is saved.").wait_for()
    assert shop.show(product) | {"name": "Lamp"} == shop.show(product) | {
        "name": "Lamp", "closesAt": known,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("zone", "wall", "told", "instant"),
    [
        ("Europe/Berlin", "2027-03-28T02:30", "02:30 is skipped that day; 03:30 is meant",
         "2027-03-28T01:30:00"),
        ("Europe/Berlin", "2027-10-31T02:30", "02:30 comes twice that day; the first is meant",
         "2027-10-31T00:30:00"),
        drill("America/New_York", "2027-03-14T02:30", "02:30 is skipped that day; 03:30 is meant",
              "2027-03-14T07:30:00"),
        drill("America/New_York", "2027-11-07T01:30",
              "01:30 comes twice that day; the first is meant", "2027-11-07T05:30:00"),
        drill("Australia/Lord_Howe", "2027-04-04T01:45",
              "01:45 comes twice that day; the first is meant", "2027-04-03T14:45:00"),
    ],
)  # fmt: skip
def test_what_the_page_says_of_a_time_is_what_is_stored(open_page, shop, zone, wall, told, instant):
    product = shop.product()
    page = open_page(f"/admin/products/{product}/edit", timezone_id=zone)
    page.fill("#f-closes", wall)
    said = page.inner_text("#utc-closes")
    assert said == f"{instant.replace('T', ' ')} UTC · {told}"
    page.set_viewport_size({"width": 360, "height": 740})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.get_by_role("button", name="Save terms").click()
    page.get_by_text("Lamp is saved.").wait_for()
    assert shop.show(product)["closesAt"] == f"{instant}.000Z"


def test_a_form_shown_again_forgets_the_offset_of_another_season(open_page, shop):
    page = open_page("/admin/products/new", timezone_id="Europe/Berlin", complain=False)
    page.fill("#f-name", "Drop")
    page.fill("#f-price", "x")
    page.fill("#f-stock", "1,5")
    page.fill("#f-opens", "2030-12-01T10:00")
    page.get_by_role("button", name="Create product").click()
    page.locator("#e-price").wait_for()
    assert "must be a whole number" in page.inner_text("#e-stock")
    assert page.input_value("#f-opens").startswith("2030-12-01T10:00")
    assert page.inner_text("#utc-opens") == "2030-12-01 09:00:00 UTC"
    page.fill("#f-opens", "2031-07-01T10:00")
    assert page.inner_text("#utc-opens") == "2031-07-01 08:00:00 UTC"
    page.fill("#f-price", "1,299.00")
    page.fill("#f-stock", "1,500")
    page.get_by_role("button", name="Create product").click()
    page.get_by_text("Drop is created with 1,500 units.").wait_for()
    product = shop.show(int(page.url.rpartition("/")[2]))
    assert product["opensAt"] == "2031-07-01T08:00:00.000Z"
    assert (product["priceCents"], product["stockRemaining"]) == (129_900, 1500)


def test_orders_are_found_by_local_time(open_page, shop):
    product, user = shop.product(), next(users)
    shop.buy(product, user)
    now = datetime.now(ZoneInfo("Asia/Kathmandu"))
    page = open_page(f"/admin/orders/?q={user}", timezone_id="Asia/Kathmandu")
    for field, minutes, found in (("#f-from", -5, 1), ("#f-from", 5, 0), ("#f-from", -5, 1)):
        wall = f"{now + timedelta(minutes=minutes):%Y-%m-%dT%H:%M}"
        page.fill(field, wall)
        page.locator(field).blur()
        rows = page.locator("#results tbody tr")
        rows.first.wait_for(state="attached" if found else "detached")
        assert rows.count() == found
    # The address finds the same, and shows the same.
    page.reload()
    assert page.input_value("#f-from").startswith(wall)
    page.locator("#results tbody tr").wait_for()


def test_a_half_typed_date_is_no_empty_one(open_page, shop):
    product = shop.product()
    page = open_page(f"/admin/products/{product}/edit", complain=False)
    page.locator("#f-opens").focus()
    page.keyboard.type("12")
    page.get_by_role("button", name="Save terms").click()
    assert "is not a date and time" in page.inner_text("#e-opens")


def test_without_a_script_times_are_utc(open_page, shop):
    product = shop.product(closesAt="2031-07-01T08:00:00.5Z")
    page = open_page(
        f"/admin/products/{product}/edit", timezone_id="Europe/Berlin", java_script_enabled=False
    )
    assert "In UTC." in page.inner_text("#z-closes")
    assert page.input_value("#f-closes").startswith("2031-07-01T08:00")
    page.fill("#f-name", "Renamed")
    page.get_by_role("button", name="Save terms").click()
    assert shop.show(product)["closesAt"] == "2031-07-01T08:00:00.500Z"
    page.goto(f"/admin/products/{product}/edit")
    page.fill("#f-closes", "2031-07-01T09:30")
    page.get_by_role("button", name="Save terms").click()
    assert shop.show(product)["closesAt"] == "2031-07-01T09:30:00.000Z"


def test_a_forgotten_tab_shows_both_and_closes_nothing(open_page, shop):
    tomorrow = datetime.now(UTC) + timedelta(days=1)
    product = shop.product(opensAt=tomorrow.isoformat())
    tab = open_page(f"/admin/products/{product}/edit", complain=False)
    page = open_page(f"/admin/products/{product}")
    # It asks, and "no" is no.
    for answer, status in (("no", 409), ("yes", 200)):
        page.get_by_role("button", name="Open now").click()
        page.click(f"#confirm [value={answer}]")
        if answer == "yes":
            page.get_by_text("Lamp is open.").wait_for()
        assert shop.buy(product).status == status
    tab.fill("#f-price", "18.50")
    tab.get_by_role("button", name="Save terms").click()
    tab.get_by_text("Changed meanwhile, and not saved").wait_for()
    assert shop.show(product)["priceCents"] == 1990
    assert tab.locator("#differences tbody tr").count() == 1
    assert "Opens" in tab.inner_text("#differences tbody")
    assert tab.input_value("#f-price") == "18.50"
    tab.get_by_role("button", name="Save terms").click()
    tab.get_by_text("Lamp is saved.").wait_for()
    assert shop.buy(product).status == 200
    assert shop.show(product)["priceCents"] == 1850


def test_a_double_click_makes_one_and_shows_its_secret(open_page):
    page = open_page("/admin/staff/")
    name = f"double {next(users)}"
    page.fill("#f-name", name)
    page.check('input[name=scope][value="orders:read"]')
    page.route("**/admin/staff/tokens", lambda route: (time.sleep(0.5), route.continue_()))
    page.get_by_role("button", name="Create token").dblclick()
    assert page.inner_text("#secret").startswith("fst_")
    # A reload asks for the page anew, and sends nothing again.
    page.reload()
    assert page.locator("td", has_text=name).count() == 1
    assert page.locator("#secret").count() == 0


def test_errors_stand_beside_their_field(open_page):
    page = open_page("/admin/products/new", complain=False)
    page.fill("#f-name", "Kept")
    page.fill("#f-price", "much")
    page.get_by_role("button", name="Create product").click()
    assert "an amount like 999.99" in page.inner_text("#e-price")
    assert page.input_value("#f-name") == "Kept"


def test_the_buttons_of_rq_dashboard_work(open_page):
    page = open_page("/admin/rq/0/view/jobs/orders/failed/8/asc/1")
    with page.expect_response("**/requeue/orders") as answer:
        page.locator("#requeue-all-btn").click()
        page.locator("#confirmation-modal-yes").click()
    assert answer.value.status == 200
    assert answer.value.json()["status"] == "OK"


def test_with_the_keyboard_alone(open_page, shop):
    product = shop.product()
    page = open_page(f"/admin/products/{product}")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    page.focus(f"#restock-open-{product}")
    page.keyboard.press("Enter")
    page.locator(f"#amount-{product}:focus").wait_for()
    page.keyboard.type("5")
    page.keyboard.press("Enter")
    page.get_by_text("5 units added: 105 are free now.").wait_for()
    page.focus(f"#menu-{product} summary")
    page.keyboard.press("Enter")
    page.keyboard.press("Escape")
    assert not page.evaluate(f"document.getElementById('menu-{product}').open")


def test_times_in_a_zone_of_ones_choice(open_page, shop):
    """Shown, typed and told in it, on this page and the next; what is stored is the instant."""
    product = shop.product(closesAt="2027-01-15T12:00:00.000Z")
    page = open_page(f"/admin/products/{product}/edit", timezone_id="Europe/Berlin")
    assert page.input_value("#f-closes").startswith("2027-01-15T13:00")
    page.select_option("#zone", "America/New_York")
    assert page.input_value("#f-closes").startswith("2027-01-15T07:00")
    assert "America/New_York" in page.inner_text("#z-closes")
    assert page.inner_text("#utc-closes") == "2027-01-15 12:00:00 UTC"
    page.fill("#f-closes", "2027-11-07T01:30")
    told = "2027-11-07 05:30:00 UTC · 01:30 comes twice that day; the first is meant"
    assert page.inner_text("#utc-closes") == told
    # What was typed is an instant, and stays that one.
    page.select_option("#zone", "UTC")
    assert page.input_value("#f-closes").startswith("2027-11-07T05:30")
    page.get_by_role("button", name="Save terms").click()
    page.get_by_text("Lamp is saved.").wait_for()
    assert shop.show(product)["closesAt"] == "2027-11-07T05:30:00.000Z"
    assert page.input_value("#zone") == "UTC"
    assert "5:30:00" in page.inner_text(".facts")
    page.select_option("#zone", "Europe/Berlin")
    assert "6:30:00" in page.inner_text(".facts")


def test_the_chart_of_one_product_and_of_a_longer_time(open_page, shop):
    product = shop.product(name="Charted", stock=1000)
    for _ in range(5):
        shop.buy(product)
    page = open_page("/admin/")
    page.select_option("#chart-product", str(product))
    free = page.locator("#legend-stock li", has_text="Free units").locator("b")
    free.get_by_text("995", exact=True).wait_for()
    assert page.url.endswith(f"?product={product}")
    page.select_option("#chart-span", "3h")
    page.wait_for_function("location.search.includes('span=3h')")
    page.reload()
    assert page.input_value("#chart-span") == "3h"
    assert page.input_value("#chart-product") == str(product)
    page.select_option("#chart-span", "15m")
    page.select_option("#chart-product", "")
    page.locator("#chart-stock canvas").wait_for()
    assert page.evaluate("location.search") == ""
