"""The example page for shoppers, in a real browser: bought once, whatever happens on the way."""

import contextlib
import json
import re
from datetime import UTC, datetime, timedelta

import jwt
import psycopg2
import pytest
from axe_playwright_python.sync_playwright import Axe
from browser import Shop
from call import call
from system import PRODUCTION, start_system, stop_system
from waiting import wait_until

from app.config import load_settings
from app.run.embedded import PostgresServer


@pytest.fixture
def shop(server):
    return Shop(server)


@pytest.fixture
def page(open_page):
    """A shopper's page: of nobody who has signed in anywhere."""
    return lambda **options: open_page("/shop", storage_state=None, **options)


def card(page, name: str):
    # The newest: a test that is run once more has made another one of that name.
    return page.locator(".product").filter(has_text=name).last


def test_buying_and_the_order_turns_confirmed(page, shop):
    product = shop.product(name="Bought here", stock=5)
    opened = page()
    item = card(opened, "Bought here")
    item.get_by_text("5 left").wait_for()
    item.get_by_label("Units").select_option("2")
    item.get_by_role("button", name="Buy Bought here").click()
    item.get_by_text("It is yours").wait_for()
    opened.locator("#orders").get_by_text("2 × Bought here · €39.80 · Confirmed").wait_for()
    item.get_by_text("3 left").wait_for()
    assert shop.show(product)["stockRemaining"] == 3


def end_hold(server, order: int) -> None:
    """Let an order's hold be over in a moment."""
    address = PostgresServer(server.data_dir).url.replace("+psycopg2", "")
    with contextlib.closing(psycopg2.connect(address)) as connection, connection:
        connection.cursor().execute(
            "UPDATE orders SET held_until = clock_timestamp() WHERE id = %s", (order,)
        )


def pay(shop, order: int):
    """Say that an order is paid, as the shop's own server does."""
    path = f"{shop.url}/orders/{order}/confirm"
    return call(path, {"payment": f"pi_{order}"}, headers=shop.headers)


def buy_held(opened, name: str):
    """Buy what is held until it is paid for; return the order's line and its id."""
    item = card(opened, name)
    item.get_by_role("button", name=f"Buy {name}").click()
    item.get_by_text("It is held for you").wait_for()
    line = opened.locator("#orders li").filter(has_text=name)
    line.get_by_text("Held for you").wait_for()
    line.get_by_role("timer").filter(has_text=re.compile(r"pay within 00:0[45]:\d\d")).wait_for()
    return line, int(line.get_attribute("id").removeprefix("order-"))


def test_a_hold_counts_down_until_it_is_paid_for(page, shop):
    shop.product(name="Reserved", stock=3, holdSeconds=300)
    line, order = buy_held(opened := page(), "Reserved")
    first = line.get_by_role("timer").inner_text()
    line.get_by_role("timer").filter(has_not_text=first).wait_for()
    # The shopper pays elsewhere: this page has no token that could confirm anything.
    assert pay(shop, order).status == 200
    line.get_by_text("Confirmed").wait_for()
    assert line.get_by_role("timer").inner_text() == ""
    assert "order-" in opened.locator("#orders li").first.get_attribute("id")


def test_a_hold_that_ends_and_a_late_payment(page, shop, server):
    product = shop.product(name="Left waiting", stock=3, holdSeconds=300)
    line, order = buy_held(opened := page(), "Left waiting")
    wait_until(
        lambda: call(f"{shop.url}/orders/{order}", headers=shop.headers).json["storedAt"],
        what="the drain",
    )
    end_hold(server, order)
    line.get_by_text("Not paid in time").wait_for()
    assert line.get_by_role("timer").inner_text() == ""
    card(opened, "Left waiting").get_by_text("3 left").wait_for()
    assert pay(shop, order).json["reclaimed"] is True
    opened.reload()
    line.get_by_text("Confirmed").wait_for()
    assert shop.show(product)["stockRemaining"] == 2


def test_what_is_held_by_others_may_come_back(page, shop):
    product = shop.product(name="Last one", stock=1, holdSeconds=300)
    opened = page(complain=False)
    item = card(opened, "Last one")
    item.get_by_text("1 left").wait_for()
    # The page asks again every ten seconds: what it was told last would let nobody press.
    told = opened.request.get("/products?limit=100").text()
    opened.route("**/products?*", lambda route: route.fulfill(body=told))
    opened.reload()
    item.get_by_text("1 left").wait_for()
    assert shop.buy(product).status == 200
    item.get_by_role("button").click()
    item.get_by_text("All are held by others").wait_for()


def test_pressing_again_and_again_buys_once(page, shop):
    product = shop.product(name="Hammered", stock=9)
    opened = page()
    # All before the first answer is there.
    opened.route("**/purchase", lambda route: (opened.wait_for_timeout(300), route.continue_()))
    button = card(opened, "Hammered").get_by_role("button")
    card(opened, "Hammered").locator("button:not(:disabled)").wait_for()
    button.evaluate("button => { for (let i = 0; i < 5; i++) button.click(); }")
    card(opened, "Hammered").get_by_text("It is yours").wait_for()
    assert shop.show(product)["stockRemaining"] == 8


def test_a_lost_answer_and_a_reload_buy_once(page, shop):
    product = shop.product(name="Lost", stock=9)
    opened = page(complain=False)
    keys = []

    def lose(route):
        keys.append(route.request.headers["idempotency-key"])
        route.fetch()  # the server has sold it
        route.abort()

    opened.route("**/purchase", lose)
    card(opened, "Lost").get_by_role("button").click()
    card(opened, "Lost").get_by_text("does not answer").wait_for()
    opened.unroute("**/purchase")
    opened.on(
        "request",
        lambda sent: (
            keys.append(sent.headers["idempotency-key"]) if sent.url.endswith("/purchase") else None
        ),
    )
    opened.reload()
    card(opened, "Lost").get_by_text("It is yours").wait_for()
    assert len(set(keys)) == 1
    assert shop.show(product)["stockRemaining"] == 8


def test_the_countdown_opens_the_button_by_the_servers_clock(page, shop):
    opens = datetime.now(UTC) + timedelta(seconds=8)
    shop.product(name="Later", opensAt=opens.isoformat(timespec="milliseconds"))
    opened = page()
    item = card(opened, "Later")
    item.get_by_text(re.compile(r"Opens in 00:00:0\d")).wait_for()
    assert item.get_by_role("button").is_disabled()
    item.get_by_text("100 left").wait_for()
    item.get_by_role("button").click()
    item.get_by_text("It is yours").wait_for()


def test_what_can_not_be_bought_says_why(page, shop):
    whys = {
        "Sold out": {"stock": 0},
        "Paused": {"paused": True},
        "Over": {"closesAt": "2020-01-01T00:00:00Z"},
    }
    for words, terms in whys.items():
        shop.product(name=f"Shut {words}", **terms)
    opened = page()
    for words in whys:
        item = card(opened, f"Shut {words}")
        item.get_by_text(words, exact=True).wait_for()
        assert item.get_by_role("button").is_disabled()


def test_refusals_in_words(page, shop):
    product = shop.product(name="Scarce", stock=2)
    opened = page(complain=False)
    item = card(opened, "Scarce")
    item.get_by_label("Units").select_option("2")
    assert shop.buy(product).status == 200
    item.get_by_role("button").click()
    item.get_by_text("Only 1 left: take fewer.").wait_for()


def test_nobody_buys_at_another_price_than_the_one_shown(page, shop):
    product = shop.product(name="Dearer", stock=2)
    opened = page(complain=False)
    item = card(opened, "Dearer")
    item.get_by_text("€19.90").wait_for()
    # The page does not learn of the change before the click.
    opened.route("**/products?*", lambda route: route.abort())
    call(
        f"{shop.url}/products/{product}", {"priceCents": 2990}, method="PATCH", headers=shop.headers
    )
    item.get_by_role("button").click()
    item.get_by_text("It costs €29.90 now. Buy again if you like.").wait_for()
    assert shop.show(product)["stockRemaining"] == 2


def test_names_are_text_whatever_they_hold(page, shop):
    shop.product(name="<img src=x onerror=alert(1)>")
    opened = page()
    opened.get_by_role("heading", name="<img src=x onerror=alert(1)>").wait_for()


@pytest.mark.drill
def test_axe_finds_nothing(page, shop):
    shop.product(name="Seen by axe", stock=3)
    opened = page()
    card(opened, "Seen by axe").get_by_role("button").click()
    card(opened, "Seen by axe").get_by_text("It is yours").wait_for()
    opened.locator("#orders li").first.wait_for()
    opened.evaluate(Axe().axe_script)
    for width in (1200, 390, 320):
        for scheme in ("light", "dark"):
            opened.set_viewport_size({"width": width, "height": 800})
            opened.emulate_media(color_scheme=scheme)
            found = opened.evaluate("axe.run(document)")["violations"]
            assert [f"{each['id']}: {each['nodes'][0]['html'][:150]}" for each in found] == []
            wide = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
            assert opened.evaluate(wide) == 0


@pytest.fixture
def with_tokens(tmp_path):
    """A system that asks shoppers for tokens, and who makes them."""
    secret = "0123456789abcdef0123456789abcdef"
    server = start_system(
        tmp_path,
        WEB_WORKERS="1",
        SHOPPER_AUTH="jwt",
        JWT_SECRET=secret,
        JWT_ISSUER="https://id.example",
        JWT_AUDIENCE="shop",
        JWT_USER_CLAIM="customer",
    )

    def token(user: str, lives: timedelta = timedelta(hours=1)) -> str:
        claims = {"iss": "https://id.example", "aud": "shop", "customer": user}
        return jwt.encode(claims | {"exp": datetime.now(UTC) + lives}, secret)

    yield server, token
    stop_system(server)


@pytest.mark.drill
def test_with_tokens_a_shopper_signs_in_first(chromium, with_tokens):
    server, token = with_tokens
    product = Shop(server).product(name="For members", stock=5)
    context = chromium.new_context(base_url=server.url)
    opened = context.new_page()
    opened.goto("/shop")

    def sign_in(text: str) -> None:
        opened.get_by_label("Your token").fill(text)
        opened.get_by_role("button", name="Sign in").click()

    item = card(opened, "For members")
    buy = item.get_by_role("button")
    item.get_by_text("5 left").wait_for()
    assert buy.is_disabled()
    for text, problem in (
        ("rubbish", "This is no token with the claim customer."),
        (token("auth0|7", -timedelta(hours=1)), "The token has expired"),
        (token("zoë"), "userId must be an integer or a text"),
    ):
        sign_in(text)
        opened.get_by_text(problem).wait_for()
        assert not opened.get_by_text("You are").is_visible()
    sign_in(token("auth0|7"))
    opened.get_by_text("You are auth0|7").wait_for()
    assert not opened.get_by_label("Your token").is_visible()
    buy.click()
    opened.locator("#orders").get_by_text("1 × For members").wait_for()

    attempts = []

    def lose(route) -> None:
        """Sell, and lose the answer; by the next attempt the token has expired."""
        attempts.append(route.request.headers["idempotency-key"])
        if len(attempts) == 1:
            assert route.fetch().status == 200
            return route.abort()
        late = {"authorization": f"Bearer {token('auth0|7', -timedelta(hours=1))}"}
        return route.continue_(headers=route.request.headers | late)

    opened.route("**/purchase", lose)
    buy.click()
    item.get_by_text("Sign in, and it goes on.").wait_for()
    assert buy.is_disabled()
    opened.unroute("**/purchase")
    sign_in(token("auth0|7"))
    item.get_by_text("It is yours").wait_for()
    assert len(set(attempts)) == 1 < len(attempts)
    assert Shop(server).show(product)["stockRemaining"] == 3

    opened.get_by_role("button", name="Be somebody else").click()
    opened.get_by_label("Your token").wait_for()
    assert opened.get_by_text("None yet").is_visible()
    context.close()


def test_a_strict_policy(client):
    answer = client.get("/shop")
    assert answer.status_code == 200
    policy = answer.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'self';")
    assert "unsafe" not in policy
    assert not re.search(r"<script>|<style|\son\w+=|style=", answer.text)


def test_off_in_production_unless_set(make_app):
    names = ("secret_key", "admin_email", "admin_password", "admin_api_token", "metrics_token")
    given = {name: PRODUCTION[name.upper()] for name in names}
    off = make_app(app_env="production", **given).test_client()
    assert off.get("/shop").status_code == 404
    assert "/shop" not in off.get("/").text
    on = make_app(app_env="production", shop_page=True, **given).test_client()
    assert on.get("/shop").status_code == 200
    assert make_app(shop_page=False).test_client().get("/shop").status_code == 404
    assert load_settings({"SHOP_PAGE": "off"}).shop_page is False
    assert json.dumps(load_settings({"SHOP_PAGE": "ON"}).shop_page) == "true"
