"""Which limit refuses a purchase: the user's, early clicks', the address's, the network's."""

from datetime import UTC, datetime, timedelta

import pytest
from crowd import at_once
from wire import purchase, serving

from app.addresses import network_of
from app.config import NO_LIMIT, RateLimit, SettingsError, load_settings, with_secrets
from app.extensions import stock
from app.stock.claims import early_limit
from app.stock.keys import KEYS

MINUTE = 60_000


def attempt(client, user, address="127.0.0.1", key=None, **more):
    return client.post(
        "/purchase",
        json={"userId": user, "productId": 1, **more},
        headers={"Idempotency-Key": key} if key else {},
        environ_base={"REMOTE_ADDR": address},
    )


def limit_of(answer) -> tuple:
    return answer.status_code, answer.json.get("limit")


def change(client, headers, **terms):
    assert client.patch("/products/1", json=terms, headers=headers).status_code == 200


@pytest.mark.parametrize(
    "early",
    [{"paused": True}, {"opensAt": (datetime.now(UTC) + timedelta(hours=1)).isoformat()}],
    ids=["paused", "not open"],
)
def test_early_clicks_leave_the_five_for_the_opening(client, buy, admin_headers, early):
    change(client, admin_headers, **early)
    for _ in range(10):
        answer = buy(1)
        assert answer.status_code == 409
        assert answer.headers["RateLimit"] == '"user";r=5;t=60'
    change(client, admin_headers, paused=False, opensAt=None)
    assert [buy(1).status_code for _ in range(6)] == [200] * 5 + [429]


def test_early_clicks_have_a_limit_of_their_own(client, buy, admin_headers):
    change(client, admin_headers, paused=True)
    statuses = [buy(1).status_code for _ in range(60)]
    assert statuses == [409] * 60
    refused = buy(1)
    assert limit_of(refused) == (429, "early")
    assert refused.headers["RateLimit-Policy"] == '"early";q=60;w=60'
    assert 1 <= int(refused.headers["Retry-After"]) <= 120
    assert buy(2).status_code == 409
    # A change of the product is obeyed at once all the same.
    change(client, admin_headers, paused=False)
    assert buy(1).status_code == 200
    assert int(stock.client.hget(KEYS.product(1), "limited_early")) == 1


def test_early_clicks_at_once_are_counted_exactly(app, client, admin_headers):
    change(client, admin_headers, paused=True)
    claims = at_once(lambda _: stock.claim(1, 1, 1, None, "a").outcome, range(80))
    assert claims.count(b"paused") == 60
    assert claims.count(b"limited_early") == 20


def test_once_the_five_are_used_an_early_click_is_over_the_users_limit(client, buy, admin_headers):
    for _ in range(5):
        buy(1)
    change(client, admin_headers, paused=True)
    assert limit_of(buy(1)) == (429, "user")


def test_a_brake_is_early_too(client, buy, admin_headers):
    client.post("/sale/brake", json={"on": True}, headers=admin_headers)
    for _ in range(7):
        assert buy(1).status_code == 409
    client.post("/sale/brake", json={"on": False}, headers=admin_headers)
    assert buy(1).status_code == 200


def test_no_memory_of_the_web_process_delays_an_opening(app, client, admin_headers):
    """The doorkeeper remembers who used up the five, never who came too early."""
    import asyncio

    async def talk():
        async with serving(app) as process:
            wire = await process.connect()

            async def ask():
                wire.send(purchase(1))
                return (await wire.reply()).status

            early = [await ask() for _ in range(62)]
            stock.client.hset(KEYS.product(1), "pause", 0)
            return early, [await ask() for _ in range(6)]

    change(client, admin_headers, paused=True)
    early, then = asyncio.run(talk())
    assert early == [409] * 60 + [429] * 2
    assert then == [200] * 5 + [429]


def test_early_clicks_are_never_held_more_tightly_than_others():
    assert early_limit(RateLimit(5, MINUTE)) == RateLimit(60, MINUTE)
    assert early_limit(RateLimit(5, 1000)) == RateLimit(300, MINUTE)
    assert early_limit(NO_LIMIT) == NO_LIMIT


def test_a_network_has_a_limit_beside_its_addresses(make_app):
    client = make_app(purchase_network_limit=RateLimit(3, MINUTE)).test_client()
    addresses = [f"2001:db8:1:{n}::1" for n in range(4)]
    answers = [attempt(client, user, address) for user, address in enumerate(addresses, 1)]
    assert [limit_of(answer)[0] for answer in answers] == [200, 200, 200, 429]
    assert answers[3].json["limit"] == "network"
    assert answers[3].headers["RateLimit-Policy"] == '"network";q=3;w=60'
    assert attempt(client, 9, "2001:db8:2::1").status_code == 200
    for last in range(3):
        assert attempt(client, 10 + last, f"192.0.2.{last}").status_code == 200
    assert limit_of(attempt(client, 20, "192.0.2.200")) == (429, "network")
    assert attempt(client, 21, "192.0.3.1").status_code == 200


def test_networks_in_words():
    assert network_of("2001:db8:1:2::/64") == "2001:db8:1::/48"
    assert network_of("192.0.2.77") == "192.0.2.0/24"
    assert network_of("unknown") == "unknown"


def test_replays_count_for_the_address_and_nothing_else(make_app):
    client = make_app(purchase_address_limit=RateLimit(5, MINUTE)).test_client()
    assert attempt(client, 1, key="k").status_code == 200
    for _ in range(3):
        assert attempt(client, 1, key="k").headers["Idempotent-Replayed"] == "true"
    assert attempt(client, 1, key="k", quantity=2).status_code == 422
    assert limit_of(attempt(client, 1, key="k")) == (429, "address")
    # From elsewhere: the user's own attempts were not used up.
    other = attempt(client, 1, "192.0.2.1")
    assert other.headers["RateLimit"].startswith('"user";r=3;')


def test_units_of_an_address(make_app, admin_headers):
    app = make_app(purchase_address_units=5)
    client = app.test_client()
    sold = [attempt(client, user, quantity=2).status_code for user in (1, 2)]
    refused = attempt(client, 3, quantity=2)
    assert (sold, refused.status_code) == ([200, 200], 409)
    assert (refused.json["code"], refused.json["limit"]) == ("purchase_limit", "address")
    assert attempt(client, 4).status_code == 200
    assert attempt(client, 5, "192.0.2.1", quantity=5, key="k").status_code == 200
    assert attempt(client, 5, "192.0.2.1", quantity=5, key="k").status_code == 200
    assert attempt(client, 6, "192.0.2.1").status_code == 409
    assert stock.client.hgetall(KEYS.address_units(1)) == {"127.0.0.1": "5", "192.0.2.1": "5"}


def test_units_of_an_address_are_exact_at_once(make_app):
    make_app(purchase_address_units=7)
    claims = at_once(lambda user: stock.claim(user, 1, 1, None, "a").outcome, range(1, 41))
    assert claims.count(b"accepted") == 7


def test_only_trusted_callers_name_a_shopper(make_app):
    callers = load_settings({"TRUSTED_CALLERS": "10.1.0.0/16, 2001:db8::/48"}).trusted_callers
    client = make_app(trusted_callers=callers).test_client()
    for address in ("10.1.2.3", "2001:db8::7", "::ffff:10.1.0.1"):
        assert attempt(client, 1, address).status_code == 200
    for address in ("10.2.0.1", "127.0.0.1", "2001:db8:1::1", "nonsense", ""):
        refused = attempt(client, 1, address)
        assert (refused.status_code, refused.json["code"]) == (403, "forbidden")
    look = {"REMOTE_ADDR": "10.2.0.1"}
    assert client.get("/purchase/orders/1", environ_base=look).status_code == 403
    look["REMOTE_ADDR"] = "10.1.0.9"
    assert len(client.get("/purchase/orders/1", environ_base=look).json) == 3
    assert client.get("/products").status_code == 200


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TRUSTED_CALLERS", "10.0.0.1/8"),
        ("TRUSTED_CALLERS", "shop.example"),
        ("TRUSTED_CALLERS", "10.0.0.0/8,"),
        ("PURCHASE_ADDRESS_UNITS", "0"),
        ("PURCHASE_ADDRESS_UNITS", "five"),
        ("PURCHASE_NETWORK_LIMIT", "100"),
    ],
)
def test_a_wrong_value_is_named(name, value):
    with pytest.raises(SettingsError, match=name):
        load_settings({name: value})


def test_callers_and_tokens_don_t_go_together(tmp_path):
    environ = {
        "TRUSTED_CALLERS": "10.0.0.0/8",
        "SHOPPER_AUTH": "jwt",
        "JWT_SECRET": "x" * 32,
        "JWT_ISSUER": "i",
        "JWT_AUDIENCE": "a",
        "DATA_DIR": str(tmp_path),
    }
    with pytest.raises(SettingsError, match="TRUSTED_CALLERS"):
        with_secrets(load_settings(environ))
