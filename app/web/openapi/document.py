"""The document (OpenAPI 3.1): which operations there are, and what each answers.

Written by hand beside the contract; the tests hold it against the routes and the running server.
"""

import json
from functools import cache
from typing import Any

from ...config import VERSION
from ...orders.lookup import MAX_LISTED
from ...products.catalogue import MOST_LISTED
from ...reading import MAX_ID
from . import feed, holds, orders
from .components import (
    CREATION_KEY,
    HEADERS,
    ID,
    IF_MATCH,
    KEY,
    LIMIT_HEADERS,
    ORDER,
    PRODUCT,
    PRODUCT_ID,
    REQUEST_ID,
    RESTOCK_KEY,
    USER,
    body,
    failures,
    integer,
    json_content,
    json_object,
    ok,
    operation,
    parameter,
    ref,
)
from .components import SCHEMAS as SHOPPERS_SCHEMAS

INTRODUCTION = """\
Sells exactly the stock there is. A purchase is answered as soon as it is decided; the order is \
stored in the database shortly after.

* Send an `Idempotency-Key` with a purchase, and repeat the request with the same key whenever no \
answer came: it is made once, and answered the same.
* A 5xx or no answer means that the outcome is unknown. Everything else is final, but for a 429.
* Errors have one form: `error` for people, `code` for programs, and `field` where one is wrong.
* `X-Request-Id` is taken over from a request, and found again in the server's log lines."""


TAGS = ("Buying", "Orders", "Events", "Products", "Operation")
SHOPPER: list[dict[str, list[str]]] = [{}, {"shopper": []}]
ADMIN: list[dict[str, list[str]]] = [{"admin": ["products:write"]}]
# Any token will do, and so does none.
OPEN_OR_ADMIN: list[dict[str, list[str]]] = [{}, {"admin": []}]
RATE_NOTE = (
    "The body's shape is checked first, then replay, rate, product, window, price, cap, stock."
)

BOUGHT = {"status": "queued", "orderId": 17, "unitPriceCents": 99_999, "currency": "USD"}
HELD = {
    "status": "held",
    "orderId": 17,
    "heldUntil": "2026-11-27T09:10:00.042Z",
    "unitPriceCents": 99_999,
    "currency": "USD",
}
UNVERIFIED = {"status": "ok", "unverified": True}
SHUT = {"status": "unavailable", "reason": "unreachable"}


def _paths() -> dict[str, Any]:
    product = json_content(ref("schemas", "Product"), product=PRODUCT)
    refused = (
        "sold_out", "insufficient_stock", "not_open", "paused", "ended", "purchase_limit",
        "price_changed", "order_ended",
    )  # fmt: skip
    conflict = (
        "Not sold: `code` tells why. `Retry-After` comes with `not_open` alone; `order_ended` "
        "is the replay of an order that was cancelled or given up since",
        refused,
        ("Retry-After", "Idempotent-Replayed"),
    )
    health = json_content(
        ref("schemas", "Health"),
        ready={"status": "ok", "checks": {"redis": {"ok": True, "state": "reachable"}}},
    )
    selling = json_content(
        ref("schemas", "Selling"), selling={"status": "ok"}, unverified=UNVERIFIED, not_selling=SHUT
    )
    readiness = {
        "200": ok("Ready", health, ()),
        "503": ok("Not ready; each part is named with its state", health, ("Retry-After",)),
        **failures(),
    }
    purchased = ok(
        "Bought. A replay has the same body",
        json_content(ref("schemas", "Purchased"), bought=BOUGHT, held=HELD),
        (*LIMIT_HEADERS, "Idempotent-Replayed"),
    )
    purchased["links"] = {
        "orders": {
            "operationId": "listOrders",
            "parameters": {"userId": "$request.body#/userId"},
            "description": "the order is listed at once",
        }
    }
    created = ok(
        "Created, and on sale; a replay has the same body",
        product,
        (*LIMIT_HEADERS, "Location", "ETag", "Idempotent-Replayed"),
    )
    created["links"] = {
        name: {"operationId": name, "parameters": {"productId": "$response.body#/id"}}
        for name in ("showProduct", "changeProduct")
    }
    before = parameter("before", "query", ID, "orders with a smaller id: the next page")
    return {
        **feed.paths(),
        "/purchase": {
            "post": operation(
                "Buying",
                "purchase",
                "Buy",
                {
                    "200": purchased,
                    **failures(
                        400,
                        401,
                        403,
                        404,
                        408,
                        409,
                        413,
                        415,
                        422,
                        429,
                        431,
                        503,
                        s409=conflict,
                        s404=("There is no such product", ["unknown_product"], ()),
                    ),
                },
                description=RATE_NOTE,
                security=SHOPPER,
                parameters=[KEY, REQUEST_ID],
                requestBody=body(
                    "Purchase",
                    one={"userId": 1, "productId": 1, "quantity": 1},
                    all_members={
                        "userId": "auth0|7f3a",
                        "productId": 1,
                        "quantity": 1,
                        "expectedPriceCents": 99_999,
                        "reference": "cart-4711",
                    },
                ),
            )
        },
        "/purchase/orders/{userId}": {
            "get": operation(
                "Buying",
                "listOrders",
                "A user's orders, newest first",
                {
                    "200": ok(
                        "The orders; those of the last moment included",
                        json_content(
                            {
                                "type": "array",
                                "items": ref("schemas", "Order"),
                                "maxItems": MAX_LISTED,
                            },
                            orders=[ORDER],
                        ),
                    ),
                    **failures(400, 401, 403, 429, 503),
                },
                security=SHOPPER,
                parameters=[
                    parameter("userId", "path", USER, "whose"),
                    parameter(
                        "limit", "query", integer(1, MAX_LISTED, default=50), "at most so many"
                    ),
                    before,
                    REQUEST_ID,
                ],
            )
        },
        "/purchase/metrics": {
            "get": operation(
                "Buying",
                "metrics",
                "The sale in figures",
                {
                    "200": ok(
                        "Totals over all products, or of one",
                        json_content(
                            ref("schemas", "Metrics"),
                            figures={
                                "stock_remaining": 45,
                                "queue_depth": 0,
                                "total_processed": 55,
                            },
                        ),
                    ),
                    **failures(400, 404, 429, 503),
                },
                parameters=[
                    parameter("productId", "query", ID, "of this product alone"),
                    REQUEST_ID,
                ],
            )
        },
        "/products": {
            "get": operation(
                "Products",
                "listProducts",
                "The products on sale, by id",
                {
                    "200": ok(
                        "Those that shoppers are shown; with an API token all, drafts, hidden and "
                        "archived ones included",
                        json_content(
                            {
                                "type": "array",
                                "items": ref("schemas", "Product"),
                                "maxItems": MOST_LISTED,
                            },
                            products=[PRODUCT],
                        ),
                        (*LIMIT_HEADERS, "Link"),
                    ),
                    **failures(400, 401, 429, 503),
                },
                security=OPEN_OR_ADMIN,
                parameters=[
                    parameter(
                        "limit",
                        "query",
                        integer(1, MOST_LISTED, default=MOST_LISTED),
                        "at most so many",
                    ),
                    parameter(
                        "after",
                        "query",
                        integer(0, MAX_ID),
                        "products with a larger id: the next page, as `Link` tells it",
                    ),
                    REQUEST_ID,
                ],
            ),
            "post": operation(
                "Products",
                "createProduct",
                "Put a product on sale",
                {
                    "201": created,
                    **failures(
                        400,
                        401,
                        403,
                        408,
                        409,
                        413,
                        415,
                        422,
                        429,
                        431,
                        503,
                        s409=("Another product has the sku", ["sku_taken"], ()),
                    ),
                },
                security=ADMIN,
                parameters=[CREATION_KEY, REQUEST_ID],
                requestBody=body(
                    "NewProduct",
                    item={
                        "name": "Flash-sale item",
                        "priceCents": 99_999,
                        "currency": "USD",
                        "stock": 100,
                    },
                ),
            ),
        },
        "/products/{productId}": {
            "get": operation(
                "Products",
                "showProduct",
                "One product",
                {
                    "200": ok("The product", product, (*LIMIT_HEADERS, "ETag")),
                    **failures(401, 404, 429, 503),
                },
                description="Drafts, hidden and archived products are found with an API token.",
                security=OPEN_OR_ADMIN,
                parameters=[PRODUCT_ID, REQUEST_ID],
            ),
            "patch": operation(
                "Products",
                "changeProduct",
                "Change terms of sale",
                {
                    "200": ok(
                        "The product; the change binds the next purchase",
                        product,
                        (*LIMIT_HEADERS, "ETag"),
                    ),
                    "202": ok(
                        "The product, changed; shards in `pendingShards` can't be reached and sell "
                        "on the terms of before, until a worker has told them",
                        json_content(ref("schemas", "ProductPending")),
                        (*LIMIT_HEADERS, "ETag"),
                    ),
                    **failures(400, 401, 403, 404, 408, 409, 413, 415, 429, 431, 503),
                },
                description="Sent again, it changes nothing more: it needs no Idempotency-Key.",
                security=ADMIN,
                parameters=[PRODUCT_ID, IF_MATCH, REQUEST_ID],
                requestBody=body("ProductChange", pause={"paused": True}),
            ),
        },
        "/products/restock": {
            "post": operation(
                "Products",
                "restock",
                "Add units to a product's stock",
                {
                    "200": ok(
                        "Added; a replay has the same body",
                        json_content(
                            ref("schemas", "Restocked"),
                            added={"productId": 1, "amount": 50, "stock_remaining": 95},
                        ),
                        (*LIMIT_HEADERS, "Idempotent-Replayed"),
                    ),
                    **failures(400, 401, 403, 404, 408, 413, 415, 422, 429, 431, 503),
                },
                security=ADMIN,
                parameters=[RESTOCK_KEY, REQUEST_ID],
                requestBody=body("Restock", fifty={"productId": 1, "amount": 50}),
            )
        },
        "/sale/brake": {
            "post": operation(
                "Products",
                "brake",
                "Stop selling one product or all at once, or release them",
                {
                    "200": ok(
                        "Done; it binds the next purchase, which is refused as `paused`. A replay "
                        "has the same `on` and `products`",
                        json_content(
                            ref("schemas", "Braked"),
                            stopped={
                                "on": True,
                                "products": 3,
                                "saleBraked": True,
                                "stillBraked": [],
                            },
                        ),
                        (*LIMIT_HEADERS, "Idempotent-Replayed"),
                    ),
                    "202": ok(
                        "Done but in the shards in `pendingShards`, which can't be reached: a "
                        "worker brings it there within seconds of their return",
                        json_content(
                            ref("schemas", "BrakedPending"),
                            stopped={
                                "on": True,
                                "products": 3,
                                "saleBraked": True,
                                "stillBraked": [],
                                "pendingShards": [1, 4],
                            },
                        ),
                        (*LIMIT_HEADERS, "Idempotent-Replayed"),
                    ),
                    **failures(400, 401, 403, 404, 408, 413, 415, 422, 429, 431, 503),
                },
                description="Needs Redis alone: with `ADMIN_API_TOKEN` it works without the "
                "database. Changes of the product and `flask rebuild` leave a brake as it is.",
                security=ADMIN,
                parameters=[KEY, REQUEST_ID],
                requestBody=body(
                    "Brake", everything={"on": True}, one={"on": True, "productId": 1}
                ),
            )
        },
        **orders.paths(),
        **holds.paths(),
        "/healthz": {
            "get": operation(
                "Operation",
                "alive",
                "Whether the process answers",
                {
                    "200": ok(
                        "It does",
                        json_content(
                            json_object({"status": {"const": "ok"}}), alive={"status": "ok"}
                        ),
                        (),
                    ),
                    **failures(),
                },
                parameters=[REQUEST_ID],
            )
        },
        "/readyz": {
            "get": operation(
                "Operation",
                "ready",
                "Whether each part that a sale needs is there",
                readiness,
                parameters=[REQUEST_ID],
            )
        },
        "/readyz/sale": {
            "get": operation(
                "Operation",
                "readyToSell",
                "Whether this process can sell",
                {
                    "200": ok("It can", selling, ()),
                    "503": ok(
                        "It can't; a balancer sends purchases elsewhere", selling, ("Retry-After",)
                    ),
                    **failures(),
                },
                description="The probe for load balancers: PostgreSQL and workers have no say.",
                parameters=[REQUEST_ID],
            )
        },
        "/health": {
            "get": operation(
                "Operation", "health", "The same as /readyz", readiness, parameters=[REQUEST_ID]
            )
        },
        "/metrics": {
            "get": operation(
                "Operation",
                "prometheusMetrics",
                "Every figure, for Prometheus",
                {
                    "200": ok(
                        "Text format of Prometheus",
                        {"text/plain": {"schema": {"type": "string"}}},
                        (),
                    ),
                    **failures(401),
                },
                security=[{"metrics": []}],
                parameters=[REQUEST_ID],
            )
        },
        "/openapi.json": {
            "get": operation(
                "Operation",
                "openapi",
                "This document",
                {"200": ok("OpenAPI 3.1", json_content({"type": "object"}), ()), **failures()},
                parameters=[REQUEST_ID],
            )
        },
        "/docs": {
            "get": operation(
                "Operation",
                "docs",
                "This document, to be read",
                {
                    "200": ok("A page", {"text/html": {"schema": {"type": "string"}}}, ()),
                    **failures(),
                },
                parameters=[REQUEST_ID],
            )
        },
    }


def _bearer(meaning: str, **more: str) -> dict[str, Any]:
    return {"type": "http", "scheme": "bearer", "description": meaning, **more}


@cache
def document() -> dict[str, Any]:
    """Return the document."""
    return {
        "openapi": "3.1.0",
        "info": {"title": "Flash sale", "version": VERSION, "description": INTRODUCTION},
        "servers": [{"url": "/"}],
        "tags": [
            {"name": name} for name in ("Buying", "Orders", "Products", "Events", "Operation")
        ],
        "paths": _paths(),
        "components": {
            "schemas": SHOPPERS_SCHEMAS | orders.SCHEMAS | holds.SCHEMAS | feed.SCHEMAS,
            "headers": {
                name: {
                    "description": meaning,
                    "schema": {"type": "string", "pattern": pattern},
                    "example": example,
                }
                for name, (pattern, example, meaning) in HEADERS.items()
            },
            "securitySchemes": {
                "shopper": _bearer(
                    "A shopper's token whose `sub` (or `JWT_USER_CLAIM`) is the userId; asked for "
                    "where the operator has set `SHOPPER_AUTH=jwt`",
                    bearerFormat="JWT",
                ),
                "admin": _bearer(
                    "An API token (`flask token create`) with the scope that is named; one with "
                    "`*` may do everything"
                ),
                "metrics": _bearer("`METRICS_TOKEN`, or `ADMIN_API_TOKEN` where it is not set"),
            },
        },
    }


@cache
def document_bytes() -> bytes:
    """Return the document as JSON."""
    return json.dumps(document(), separators=(",", ":")).encode()
