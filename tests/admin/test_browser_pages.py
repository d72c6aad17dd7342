"""What a person meets on the pages: menus, notes, questions, focus, lists, the chart."""

import csv
import io
import re
import time

import pytest
import redis
from browser import PAGES, users
from drills import drill

from app.config import load_settings
from app.run.embedded import embedded_servers

WIDTHS = (1920, 1440, 1366, 1280, 1200, 390)
# Whether a click in the middle of an element reaches it, wherever it lies.
REACHED = """element => {
  element.scrollIntoView({ block: 'center' })
  const { x, y, width, height } = element.getBoundingClientRect()
  return element.contains(document.elementFromPoint(x + width / 2, y + height / 2))
}"""
CUT_OFF = "all => all.filter(e => e.scrollWidth > e.clientWidth).map(e => e.innerText.slice(0, 90))"
# What a click would reach if no note were there, and does not.
COVERED = """() => {
  const all = [...document.querySelectorAll('a, button, input, summary')]
  const reached = () => all.filter((each) => {
    const { x, y, width, height } = each.getBoundingClientRect()
    return each.contains(document.elementFromPoint(x + width / 2, y + height / 2))
  })
  const toasts = document.getElementById('toasts')
  const now = new Set(reached())
  toasts.style.visibility = 'hidden'
  const without = reached()
  toasts.style.visibility = ''
  return without.filter((each) => !now.has(each)).map((each) => each.outerHTML)
}"""
# The name in a narrow bar is all that a note may lie over: it leads where the menu leads, too.
BRAND = '<a class="brand"'


def covered(page) -> list[str]:
    return [each for each in page.evaluate(COVERED) if not each.startswith(BRAND)]


def add_person(page) -> str:
    page.goto("/admin/staff/")
    email = f"person{next(users)}@example.com"
    page.fill("#f-email", email)
    page.get_by_role("button", name="Add", exact=True).click()
    page.locator("#secret").wait_for()
    return email


@pytest.mark.parametrize("width", [*map(drill, (1440, 700)), 390])
def test_a_menu_is_whole_whatever_it_hangs_over(open_page, width):
    page = open_page("/admin/staff/", viewport={"width": width, "height": 700})
    email = add_person(page)
    page.goto("/admin/staff/")
    page.get_by_label(f"Change {email}").click()
    acts = page.locator("details[open] .menu-list button")
    assert acts.all_inner_texts() == ["Make admin", "Reset password", "Deactivate"]
    assert all(act.evaluate(REACHED) for act in acts.all())
    acts.first.click()
    page.locator(".toast-note.success", has_text=email).wait_for()


@pytest.mark.drill
def test_no_table_is_cut_off(open_page, shop):
    product = shop.product(name="A product with quite a long name, as marketing people like them")
    page = open_page("/admin/")
    for path in [path for path in PAGES if "/rq/" not in path] + [f"/admin/products/{product}"]:
        page.goto(path)
        tables = page.locator(".table-wrap")
        # To lay a page out anew takes longest.
        for width in WIDTHS if tables.count() else ():
            page.set_viewport_size({"width": width, "height": 900})
            found = tables.evaluate_all(CUT_OFF)
            assert found == [], f"{path}, {width} px wide"


@pytest.mark.parametrize("width", [drill(1440), 390])
def test_a_note_lies_over_nothing_and_speaks_of_the_newest_act(open_page, shop, width):
    product = shop.product()
    page = open_page("/admin/", viewport={"width": width, "height": 700}, complain=False)
    row = page.locator(f"#product-{product}")

    def restock(amount: str) -> None:
        page.click(f"#restock-open-{product}")
        page.fill(f"#amount-{product}", amount)
        page.click(f"#restock-form-{product} button")

    restock("500")
    note = page.locator(".toast-note", has_text="500 units added")
    note.wait_for()
    assert covered(page) == []
    # An error is not hidden by what went well before it.
    restock("many")
    error = row.locator(".field-error")
    error.wait_for()
    assert note.count() == 0
    assert error.evaluate(REACHED)
    assert covered(page) == []


def test_an_error_stays_until_it_is_closed_and_is_said_once(open_page, shop):
    product = shop.product()
    page = open_page(f"/admin/products/{product}", complain=False)
    page.route(
        "**/sale", lambda route: route.fulfill(status=503, body="Busy", content_type="text/plain")
    )
    for _ in range(2):
        with page.expect_response("**/sale"):
            page.get_by_role("button", name="Pause").click()
    error = page.locator(".toast-note.error", has_text="Busy")
    error.wait_for()
    assert error.count() == 1
    assert covered(page) == []
    error.get_by_role("button", name="Close this note").click()
    assert error.count() == 0


@pytest.fixture
def stored_order(shop, open_page):
    """An order's page, when it is stored."""
    product = shop.product()
    order = shop.buy(product, next(users), quantity=2).json["orderId"]
    page = open_page(f"/admin/orders/{order}", complain=False)
    page.get_by_text("Persisted").wait_for()
    return page


def test_without_a_reason_nothing_is_asked(stored_order):
    page = stored_order
    for reason in ("", "   "):
        page.fill("#f-reason", reason)
        page.get_by_role("button", name="Cancel order").click()
        assert not page.locator("#confirm").evaluate("dialog => dialog.open")
        assert page.evaluate("document.activeElement.id") == "f-reason"
        assert page.locator("#f-reason").evaluate("input => !input.validity.valid")
        page.locator("#f-reason").blur()


def test_back_never_sends_a_form_again(stored_order):
    page, address = stored_order, stored_order.url
    # Past the browser's own check, as an older browser would.
    page.locator("form[data-confirm]").evaluate("form => { form.noValidate = true }")
    page.get_by_role("button", name="Cancel order").click()
    page.click("#confirm [value=yes]")
    page.locator("#e-reason").wait_for()
    assert page.url == address
    page.fill("#f-reason", "ordered by mistake")
    page.get_by_role("button", name="Cancel order").click()
    page.click("#confirm [value=yes]")
    page.get_by_text("2 units back in stock").wait_for()
    assert page.go_back().status == 200
    assert page.url == address
    assert page.get_by_text("Cancelled by staff").count() == 1


def test_an_orders_job_is_a_link_while_rq_knows_it(stored_order, server):
    page, address = stored_order, stored_order.url
    page.get_by_role("link", name=re.compile("^Job ")).click()
    page.wait_for_url("**/admin/rq/0/view/job/**")
    job = page.url.rpartition("/")[2]
    servers = embedded_servers(load_settings({"DATA_DIR": str(server.data_dir)}))
    redis.Redis.from_url(servers["redis_url"].url).delete(f"rq:job:{job}")
    page.goto(address)
    assert page.get_by_text(f"Job {job[:8]}").count() == 1
    assert page.get_by_role("link", name=re.compile("^Job ")).count() == 0


def test_the_jobs_are_those_of_the_queue_that_is_used(open_page, shop):
    shop.buy(shop.product())
    page = open_page("/admin/rq/")
    page.get_by_role("navigation", name="Jobs").get_by_role("link", name="Jobs").click()
    page.wait_for_url("**/view/jobs/orders/finished/**")
    assert page.input_value("#select-queue") == "orders"
    page.locator("[data-role=job]").first.wait_for()


def test_an_error_keeps_the_menu(open_page):
    page = open_page("/admin/", complain=False)
    for path, status in (("/admin/nothing", 404), ("/admin/orders/999999999", 404)):
        assert page.goto(path).status == status
        assert page.get_by_role("navigation", name="Main").get_by_role("link").count() == 9


def test_the_keyboard_is_led_where_one_acts(open_page, shop):
    product = shop.product()
    page = open_page(f"/admin/products/{product}")
    focused = "document.activeElement.id"
    for _ in range(2):
        page.focus(f"#restock-open-{product}")
        page.keyboard.press("Enter")
        page.locator(f"#amount-{product}:focus").wait_for()
        page.keyboard.press("Escape")
        assert page.evaluate(focused) == f"restock-open-{product}"
    menu = page.locator(f"#menu-{product} summary")
    menu.focus()
    page.keyboard.press("Enter")
    page.get_by_role("button", name="End sale").focus()
    page.keyboard.press("Enter")
    page.locator("#confirm[open]").wait_for()
    page.keyboard.press("Escape")
    page.locator("#confirm").wait_for(state="hidden")
    assert menu.evaluate("summary => summary === document.activeElement")


def test_buttons_say_of_which_product_they_are(open_page, shop):
    name = f"Lamp {next(users)}"
    product = shop.product(name=name)
    page = open_page(f"/admin/products/?q={name.replace(' ', '+')}")
    row = page.locator(f"#product-{product}")
    assert row.get_by_role("button", name=f"Pause {name}", exact=True).count() == 1
    assert row.get_by_text(f"Restock {name}").count() == 1
    assert row.get_by_label(f"More about {name}").count() == 1


def test_products_are_found_filtered_and_sorted(open_page, shop):
    word = f"Vase{next(users)}"
    made = [
        shop.product(name=f"{word} {letter}", stock=stock)
        for letter, stock in zip("cab", (3, 1, 2), strict=True)
    ]
    page = open_page("/admin/products/")
    page.fill("#p-q", word.lower())
    page.wait_for_url(f"**q={word.lower()}*")

    def shown() -> list[int]:
        return page.locator(".product").evaluate_all("all => all.map(row => +row.id.slice(8))")

    page.wait_for_function("() => document.querySelectorAll('.product').length === 3")
    assert shown() == made[::-1]
    page.select_option("#p-sort", "name")
    page.wait_for_url("**sort=name*")
    page.wait_for_function(f"() => document.querySelector('.product').id === 'product-{made[1]}'")
    assert shown() == [made[1], made[2], made[0]]
    # A row stays where it is, whatever becomes of it; asked anew, it is where it belongs.
    shop.buy(made[1])
    page.locator(f"#product-{made[1]}").get_by_text("Sold out").wait_for()
    assert shown() == [made[1], made[2], made[0]]
    page.select_option("#p-state", "live")
    page.wait_for_url("**state=live*")
    page.wait_for_function("() => document.querySelectorAll('.product').length === 2")


def test_spans_of_time_fill_the_filter(open_page, shop):
    user = next(users)
    shop.buy(shop.product(), user)
    page = open_page(f"/admin/orders/?q={user}", timezone_id="Asia/Kolkata")
    for span, orders in (("hour", 1), ("yesterday", 0), ("today", 1)):
        with page.expect_response(lambda answer: "from=" in answer.url):
            page.click(f"[data-span={span}]")
        page.wait_for_function(
            "count => document.querySelectorAll('#results tbody tr').length === count", arg=orders
        )


def test_the_export_opens_in_a_spreadsheet_as_it_was_meant(open_page, shop):
    user = 9_007_199_254_740_991
    shop.buy(shop.product(name="＝cmd"), user)
    page = open_page(f"/admin/orders/?q={user}")
    with page.expect_download() as download:
        page.get_by_role("link", name="Export CSV").click()
    data = download.value.path().read_bytes()
    assert data.startswith(b"\xef\xbb\xbf")
    row = next(csv.DictReader(io.StringIO(data.decode("utf-8-sig"))))
    assert (row["user"], row["product name"]) == (f"'{user}", "'＝cmd")


# Keeps what each canvas shows as text: one drawing begins where everything is wiped away.
WATCH_TEXTS = """
  const { fillText, clearRect } = CanvasRenderingContext2D.prototype
  CanvasRenderingContext2D.prototype.clearRect = function (...where) {
    this.canvas.texts = []
    clearRect.apply(this, where)
  }
  CanvasRenderingContext2D.prototype.fillText = function (text, ...where) {
    this.canvas.texts?.push(text)
    fillText.call(this, text, ...where)
  }
"""
# Column by column of the first chart's pixels: 1 where the blue line, or the area below it, is.
DRAWN_COLUMNS = """() => {
  const canvas = document.querySelector('#chart-traffic canvas')
  const { width, height } = canvas
  const { data } = canvas.getContext('2d').getImageData(0, 0, width, height)
  return Array.from({ length: width }, (_, x) => {
    for (let y = 0; y < height; y++) {
      const [red, , blue, alpha] = data.subarray((y * width + x) * 4, (y * width + x) * 4 + 4)
      if (alpha && blue - red > 80) return 1
    }
    return 0
  }).join('')
}"""


@pytest.fixture
def open_chart(open_page):
    """Open the dashboard with samples of so many seconds, of which the middle fifth is missing."""

    def open_one(seconds: int, **options):
        now = int(time.time())
        moments = [now - age for age in range(seconds, 0, -1) if not 0.4 < age / seconds < 0.6]
        figures = {name: [5] * len(moments) for name in ("accepted", "refused", "waiting", "free")}
        page = open_page("about:blank", color_scheme="light", **options)
        page.add_init_script(WATCH_TEXTS)
        page.route(
            "**/chart.json*", lambda route: route.fulfill(json={"second": moments, **figures})
        )
        page.goto("/admin/")
        page.locator("#chart-stock canvas").wait_for()
        return page

    return open_one


@pytest.mark.parametrize("seconds", [*map(drill, (20, 70, 890)), 180])
def test_the_charts_axis_says_each_moment_once(open_chart, seconds):
    page = open_chart(seconds)
    for texts in page.locator(".chart canvas").evaluate_all("all => all.map(each => each.texts)"):
        moments = [text for text in texts if ":" in text]
        assert moments
        assert len(moments) == len(set(moments))


def test_a_gap_in_the_samples_is_a_gap_in_the_chart(open_chart):
    columns = open_chart(600).evaluate(DRAWN_COLUMNS).strip("0")
    gap = max(len(run) for run in columns.split("1"))
    assert gap / len(columns) == pytest.approx(0.2, abs=0.03)


def test_what_is_not_known_now_is_no_figure_of_the_chart(open_chart):
    """As the tiles above it: the last figure of before stays where it was, as a line."""
    # The browser itself complains of the 503.
    page = open_chart(60, complain=False)
    page.select_option("#chart-product", "1")
    free = page.locator("#legend-stock li").first
    free.get_by_text("5", exact=True).wait_for()
    page.unroute("**/chart.json*")
    page.route("**/chart.json*", lambda route: route.fulfill(status=503, json={}))
    free.get_by_text("–", exact=True).wait_for()
    page.locator("#chart-stock .u-over").hover(position={"x": 20, "y": 20})
    free.get_by_text("5", exact=True).wait_for()


def test_the_apis_page_fits_a_phone(open_page):
    page = open_page("/docs")
    for width in (390, 360, 320):
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_each_operation_has_a_command(open_page):
    page = open_page("/docs")
    for section in page.locator("section").all():
        assert section.locator("pre").first.inner_text().startswith("curl ")


def test_what_only_reads_can_be_tried_by_a_click(open_page):
    page = open_page("/docs")
    links = page.locator("section p a").evaluate_all("all => all.map(each => each.pathname)")
    assert {"/products", "/products/1", "/purchase/orders/1", "/readyz"} <= set(links)
    assert "/metrics" not in links
    page.get_by_role("link", name="/products/1", exact=True).click()
    page.wait_for_url("**/products/1")
    assert page.request.get("/products/1").json()["id"] == 1
