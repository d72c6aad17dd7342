"""A client that openapi-python-client generates from the description, on the running system."""

import importlib
import itertools
import json
import random
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest
from call import call
from waiting import patience, wait_until

users = itertools.count(random.randrange(10**9, 2**52))


@pytest.fixture(scope="module")
def generated(server, tmp_path_factory):
    """The generated package's modules, and a client that keeps the bodies it has sent."""
    folder = tmp_path_factory.mktemp("generated")
    (folder / "openapi.json").write_bytes(call(f"{server.url}/openapi.json").body)
    (folder / "config.yml").write_text("post_hooks: []\n")
    made = subprocess.run(
        [
            *(sys.executable, "-m", "openapi_python_client", "generate", "--meta", "none"),
            *("--path", "openapi.json", "--config", "config.yml", "--fail-on-warning"),
            *("--output-path", "generated_shop_client"),
        ],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=patience(120),
        check=False,
    )
    assert made.returncode == 0, made.stdout + made.stderr
    sys.path.insert(0, str(folder))
    shop = importlib.import_module("generated_shop_client")
    names = {
        "buying": ("purchase", "list_orders", "metrics"),
        "orders": (
            "cancel_order",
            "find_orders",
            "show_bulk_cancel",
            "show_order",
            "start_bulk_cancel",
        ),
        "products": (
            "change_product",
            "create_product",
            "list_products",
            "restock",
            "show_product",
        ),
    }
    sent = []
    client = shop.AuthenticatedClient(
        base_url=server.url,
        token=server.api_token,
        httpx_args={"event_hooks": {"request": [lambda request: sent.append(request.content)]}},
    )
    yield SimpleNamespace(
        client=client,
        anonymous=shop.Client(base_url=server.url),
        sent=sent,
        models=importlib.import_module("generated_shop_client.models"),
        **{
            name: importlib.import_module(f"generated_shop_client.api.{group}.{name}")
            for group, members in names.items()
            for name in members
        },
    )
    client.get_httpx_client().close()
    sys.path.remove(str(folder))


@pytest.fixture
def product(generated):
    """A product with terms that are nobody's defaults."""
    body = generated.models.NewProduct(
        name="Generated",
        price_cents=500,
        currency="EUR",
        stock=5,
        max_quantity=2,
        opens_at=datetime.now(UTC) - timedelta(hours=1),
    )
    return generated.create_product.sync(client=generated.client, body=body)


def test_a_change_sends_what_was_changed_and_nothing_else(generated, product):
    pause = generated.models.ProductChange(paused=True)
    generated.change_product.sync(product.id, client=generated.client, body=pause)
    generated.sent.clear()
    price = generated.models.ProductChange(price_cents=120)
    changed = generated.change_product.sync(product.id, client=generated.client, body=price)
    assert [json.loads(body) for body in generated.sent] == [{"priceCents": 120}]
    assert (changed.price_cents, changed.max_quantity, changed.paused) == (120, 2, True)
    assert changed.opens_at == product.opens_at


def test_a_change_of_a_version_that_is_gone(generated, product):
    shown = generated.show_product.sync_detailed(product.id, client=generated.client)
    answers = [
        generated.change_product.sync_detailed(
            product.id,
            client=generated.client,
            body=generated.models.ProductChange(name=name),
            if_match=shown.headers["ETag"],
        )
        for name in ("First", "Second")
    ]
    assert [answer.status_code for answer in answers] == [200, 409]
    assert answers[1].parsed.code == "stale_version"
    assert answers[1].parsed.product.name == "First"


def test_a_creation_is_repeated_by_its_key(generated):
    body = generated.models.NewProduct(name="Once", price_cents=1, currency="EUR", stock=1)
    answers = [
        generated.create_product.sync_detailed(
            client=generated.client, body=body, idempotency_key=f"once-{next(users)}"
        )
        for _ in range(2)
    ]
    assert answers[0].parsed.id != answers[1].parsed.id
    key = f"once-{next(users)}"
    answers = [
        generated.create_product.sync_detailed(
            client=generated.client, body=body, idempotency_key=key
        )
        for _ in range(2)
    ]
    assert answers[0].parsed == answers[1].parsed
    assert answers[1].headers["Idempotent-Replayed"] == "true"


def test_buying_looking_up_and_restocking(generated, product):
    models, client, user = generated.models, generated.client, next(users)
    body = models.Purchase(user_id=user, product_id=product.id, quantity=2)
    bought = generated.purchase.sync(client=client, body=body, idempotency_key="one-intent")
    orders = generated.list_orders.sync(user, client=client)
    assert [(order.id, order.product_id, order.quantity) for order in orders] == [
        (bought.order_id, product.id, 2)
    ]
    more = generated.restock.sync(
        client=client, body=models.Restock(product_id=product.id, amount=10, reason="generated")
    )
    assert more.stock_remaining == 13
    figures = generated.metrics.sync(client=client, product_id=product.id)
    assert figures.stock_remaining == 13


def test_buying_as_a_text_at_the_price_that_was_shown(generated, product):
    models, client, user = generated.models, generated.client, f"auth0|{next(users)}"
    body = models.Purchase(
        user_id=user, product_id=product.id, expected_price_cents=500, reference="cart-1"
    )
    bought = generated.purchase.sync(client=client, body=body, idempotency_key=user)
    assert (bought.unit_price_cents, bought.currency) == (500, "EUR")
    (order,) = generated.list_orders.sync(user, client=client)
    assert (order.id, order.unit_price_cents, order.reference) == (bought.order_id, 500, "cart-1")
    body.expected_price_cents = 499
    refused = generated.purchase.sync(client=client, body=body)
    assert (refused.code, refused.price_cents, refused.currency) == ("price_changed", 500, "EUR")


def test_products_page_by_page_with_what_only_the_staff_sees(generated):
    models, client = generated.models, generated.client
    made = [
        generated.create_product.sync(
            client=client,
            body=models.NewProduct(
                name=visibility,
                price_cents=1500,
                currency="JPY",
                stock=1,
                sku=f"sku-{next(users)}",
                visibility=models.NewProductVisibility(visibility),
            ),
        )
        for visibility in ("draft", "hidden", "listed")
    ]
    draft, hidden, listed = (product.id for product in made)
    assert made[0].visibility == models.ProductVisibility.DRAFT
    assert (made[0].currency_digits, made[0].archived) == (0, False)

    def ids(client, **query):
        return [p.id for p in generated.list_products.sync(client=client, **query)]

    assert ids(client, after=draft - 1) == [draft, hidden, listed]
    assert ids(generated.anonymous, after=draft - 1) == [listed]
    first = generated.list_products.sync_detailed(client=client, after=draft - 1, limit=2)
    assert [product.id for product in first.parsed] == [draft, hidden]
    assert first.headers["Link"] == f'</products?limit=2&after={hidden}>; rel="next"'
    archive = models.ProductChange(archived=True)
    assert generated.change_product.sync(listed, client=client, body=archive).archived
    gone = generated.show_product.sync(listed, client=generated.anonymous)
    assert gone.code == "unknown_product"


def test_refusals_of_a_sku_and_of_a_currency(generated, product):
    models, client = generated.models, generated.client
    taken = models.ProductChange(sku=f"sku-{next(users)}")
    generated.change_product.sync(product.id, client=client, body=taken)
    body = models.NewProduct(name="Second", price_cents=1, currency="EUR", stock=1, sku=taken.sku)
    assert generated.create_product.sync(client=client, body=body).code == "sku_taken"
    purchase = models.Purchase(user_id=next(users), product_id=product.id)
    generated.purchase.sync(client=client, body=purchase)
    change = models.ProductChange(currency="USD")
    refused = generated.change_product.sync(product.id, client=client, body=change)
    assert refused.code == "currency_fixed"


def test_orders_are_found_and_given_back(generated, product):
    models, client, user = generated.models, generated.client, f"auth0|{next(users)}"
    body = models.Purchase(user_id=user, product_id=product.id, quantity=2, reference="cart-2")
    order_id = generated.purchase.sync(client=client, body=body).order_id
    page = generated.find_orders.sync(client=client, user_id=user, reference="cart-2")
    assert [(order.id, order.user_id) for order in page.orders] == [(order_id, user)]
    assert page.next_ is None
    answers = [
        generated.cancel_order.sync_detailed(
            order_id,
            client=client,
            body=models.Cancel(reason="broken", quantity=1),
            idempotency_key="one",
        )
        for _ in range(2)
    ]
    assert answers[0].parsed == answers[1].parsed
    assert answers[1].headers["Idempotent-Replayed"] == "true"

    def returned():
        order = generated.show_order.sync(order_id, client=client)
        return order if order.cancelled_quantity else None

    order = wait_until(returned, 20, "the unit to come back")
    assert (order.status, order.quantity, order.cancelled_quantity) == ("CONFIRMED", 2, 1)
    refused = generated.cancel_order.sync(
        order_id, client=client, body=models.Cancel(reason="x", quantity=2)
    )
    assert refused.code == "too_many_units"


def test_many_orders_are_cancelled(generated, product):
    models, client = generated.models, generated.client
    body = models.Purchase(user_id=next(users), product_id=product.id, quantity=2)
    order_id = generated.purchase.sync(client=client, body=body).order_id

    def is_stored() -> bool:
        return generated.show_order.sync(order_id, client=client).status != "QUEUED"

    wait_until(is_stored, 20, "the order to be stored")
    dry = models.BulkCancel(product_id=product.id, dry_run=True)
    plan = generated.start_bulk_cancel.sync(client=client, body=dry)
    assert (plan.orders, plan.units) == (1, 2)
    begun = generated.start_bulk_cancel.sync(
        client=client,
        body=models.BulkCancel(
            product_id=product.id,
            orders=plan.orders,
            through_order_id=plan.through_order_id,
            reason="recall",
        ),
    )

    def ended():
        bulk = generated.show_bulk_cancel.sync(begun.id, client=client)
        return bulk if bulk.status != "running" else None

    bulk = wait_until(ended, 20, "the orders to be cancelled")
    assert (bulk.status, bulk.cancelled_units) == ("done", 2)
