"""Every page for everybody: axe-core's rules, wide and narrow, light and dark."""

import pytest
from axe_playwright_python.sync_playwright import Axe
from browser import PAGES
from call import call

# Besides the pages that are there at once: an order's, a form of its own, an error, the API's.
MORE = ("/admin/orders/{order}", "/admin/products/1/restock", "/admin/nothing", "/docs")


@pytest.fixture(scope="module")
def order(server) -> int:
    """An order and a movement, so that there is something to be seen."""
    headers = {"Authorization": f"Bearer {server.api_token}"}
    restock = {"productId": 1, "amount": 5, "reason": "to be seen"}
    call(f"{server.url}/products/restock", restock, headers=headers)
    return call(f"{server.url}/purchase", {"userId": 910_001, "productId": 1}).json["orderId"]


def complaints(page, **options) -> list[str]:
    """Return what axe finds on the page as it stands."""
    violations = page.evaluate("options => axe.run(document, options)", options)["violations"]
    return [f"{each['id']}: {node['html'][:150]}" for each in violations for node in each["nodes"]]


def everywhere(page) -> list[str]:
    """Return what axe finds on the page in each size and theme."""
    page.evaluate(Axe().axe_script)
    found = []
    for width in (1440, 390):
        page.set_viewport_size({"width": width, "height": 900})
        page.emulate_media(color_scheme="light", reduced_motion="reduce")
        found += complaints(page)
        # Another theme has other colours, and nothing else.
        page.emulate_media(color_scheme="dark", reduced_motion="reduce")
        page.wait_for_function("() => !document.documentElement.matches('[data-bs-theme=light]')")
        found += complaints(page, runOnly=["color-contrast"])
    return found


@pytest.mark.drill
@pytest.mark.parametrize("path", [*PAGES, *MORE])
def test_axe_finds_nothing(open_page, order, path):
    page = open_page(path.format(order=order), complain=False)
    # rq-dashboard fills its tables by scripts of its own.
    page.wait_for_load_state("networkidle" if "/rq/" in path else "load")
    assert everywhere(page) == []


def test_axe_finds_nothing_where_one_signs_in(open_page):
    assert everywhere(open_page("/admin/", storage_state=None)) == []


@pytest.mark.drill
@pytest.mark.parametrize("opened", ["menu", "question", "restock"])
def test_axe_finds_nothing_in_what_opens(open_page, order, opened):
    page = open_page("/admin/products/1")
    page.locator(f"#{'restock' if opened == 'restock' else 'menu'}-1 summary").click()
    if opened == "restock":
        page.locator("#amount-1").wait_for()
    if opened == "question":
        page.get_by_role("button", name="End sale").click()
    page.evaluate(Axe().axe_script)
    assert complaints(page) == []
