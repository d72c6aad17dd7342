"""Whom the address limits count, and that nobody can choose it."""

import asyncio

import pytest
from wire import purchase, serving

from app.addresses import client_of
from app.config import RateLimit

TWICE = {"purchase_address_limit": RateLimit(2, 60_000), "purchase_user_limit": RateLimit(0, 0)}


@pytest.mark.parametrize(
    ("address", "client"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("192.0.2.1:4711", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("::FFFF:C000:0201", "192.0.2.1"),
        ("[::ffff:192.0.2.1]:80", "192.0.2.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:DB8:1:2::", "2001:db8:1:2::/64"),
        ("[2001:db8:1:2:ffff::1]", "2001:db8:1:2::/64"),
        ("[2001:db8:1:2:ffff::1]:4711", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("::1", "::/64"),
        ("", ""),
        ("unix:", "unix:"),
        ("x" * 1000, "x" * 64),
    ],
)
def test_clients(address, client):
    assert client_of(address) == client


def attempt(client, user, address="192.0.2.1", **headers):
    return client.post(
        "/purchase",
        json={"userId": user, "productId": 1},
        headers=headers,
        environ_overrides={"REMOTE_ADDR": address},
    ).status_code


def test_one_subscriber_has_one_limit_however_many_addresses(make_app):
    client = make_app(**TWICE).test_client()
    addresses = [f"2001:db8:1:2::{number:x}" for number in range(1, 4)]
    assert [attempt(client, i, address) for i, address in enumerate(addresses, 1)] == [
        200,
        200,
        429,
    ]
    assert attempt(client, 9, "2001:db8:1:3::1") == 200
    mapped = ["192.0.2.1", "::ffff:192.0.2.1", "::ffff:c000:201"]
    assert [attempt(client, i, address) for i, address in enumerate(mapped, 1)] == [200, 200, 429]


def test_a_forged_header_has_no_effect_without_proxies(make_app):
    client = make_app(**TWICE).test_client()
    codes = [
        attempt(client, i, **{"X-Forwarded-For": f"198.51.100.{i}", "X-Real-IP": f"203.0.113.{i}"})
        for i in range(1, 4)
    ]
    assert codes == [200, 200, 429]


@pytest.mark.parametrize("hops", [1, 2])
def test_only_the_trusted_hops_are_believed(make_app, hops):
    client = make_app(trusted_proxies=hops, **TWICE).test_client()
    # What a client writes itself stands to the left of what the trusted proxies add.
    trusted = ["198.51.100.7", "10.0.0.1"][:hops]
    codes = [
        attempt(
            client, i, "10.0.0.9", **{"X-Forwarded-For": ", ".join([f"203.0.113.{i}", *trusted])}
        )
        for i in range(1, 4)
    ]
    assert codes == [200, 200, 429]
    other = ", ".join(["198.51.100.8", "10.0.0.1"][:hops])
    assert attempt(client, 9, "10.0.0.9", **{"X-Forwarded-For": other}) == 200


def test_fewer_hops_than_trusted_count_the_connection(make_app):
    client = make_app(trusted_proxies=2, **TWICE).test_client()
    codes = [attempt(client, i, **{"X-Forwarded-For": f"203.0.113.{i}"}) for i in range(1, 4)]
    assert codes == [200, 200, 429]


def on_the_event_loop(app, requests) -> list[int]:
    """Send purchases, each as (address, X-Forwarded-For headers), by wire; return statuses."""

    async def send_all() -> list[int]:
        async with serving(app) as process:
            statuses = []
            for user, (address, forwarded) in enumerate(requests, 1):
                wire = await process.connect(address)
                wire.send(purchase(user, *(f"X-Forwarded-For: {value}" for value in forwarded)))
                statuses.append((await wire.reply()).status)
            return statuses

    return asyncio.run(send_all())


def test_the_event_loops_way_in_counts_the_same(make_app):
    forged = [("127.0.0.7", [f"203.0.113.{i}"]) for i in range(3)] + [("127.0.0.8", [])]
    assert on_the_event_loop(make_app(**TWICE), forged) == [200, 200, 429, 200]
    six = [("127.0.0.9", [f"2001:db8:7:{net}::{i}"]) for i, net in enumerate([7, 7, 7, 8])]
    app = make_app(trusted_proxies=1, **TWICE)
    assert on_the_event_loop(app, six) == [200, 200, 429, 200]
    behind = [("127.0.0.9", [f"203.0.113.{i}, 198.51.100.7"]) for i in range(3)]
    # The same header twice is one list (RFC 9110, 5.3).
    behind += [("127.0.0.9", ["203.0.113.9", "198.51.100.7"]), ("127.0.0.9", ["198.51.100.8"])]
    assert on_the_event_loop(app, behind) == [200, 200, 429, 429, 200]


def test_a_client_chooses_no_host(make_app, admin_headers):
    client = make_app(trusted_proxies=1).test_client()
    product = {"name": "Lamp", "priceCents": 1, "currency": "USD", "stock": 1}
    headers = admin_headers | {"X-Forwarded-Host": "evil.example", "X-Forwarded-Prefix": "/evil"}
    created = client.post("/products", json=product, headers=headers)
    assert created.status_code == 201
    assert "evil" not in created.headers["Location"]


def test_the_other_routes_count_the_same_way(make_app):
    client = make_app().test_client()
    left = []
    for address in ("2001:db8:9::1", "2001:db8:9::2", "192.0.2.77", "::ffff:192.0.2.77", ""):
        answer = client.get("/products", environ_overrides={"REMOTE_ADDR": address})
        left.append(int(answer.headers["RateLimit"].split("r=")[1].split(";")[0]))
    assert left == [599, 598, 599, 598, 599]
