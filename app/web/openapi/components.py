"""What the operations are made of: schemas, headers, errors."""

from collections.abc import Sequence
from typing import Any

from ...models import MAX_HOLD_SECONDS, MIN_HOLD_SECONDS
from ...orders.search import STATUSES as ORDER_STATUSES
from ...reading import CONTROLS, INVISIBLE, MAX_ID, MAX_QUANTITY, MAX_RESTOCK, MAX_STOCK


def ref(kind: str, name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/{kind}/{name}"}


def integer(low: int, high: int, meaning: str = "", **more: object) -> dict[str, Any]:
    schema = {"type": "integer", "minimum": low, "maximum": high, **more}
    return schema | ({"description": meaning} if meaning else {})


def json_object(
    properties: dict[str, Any], required: list[str] | None = None, **more: object
) -> dict[str, Any]:
    names = list(properties) if required is None else required
    return {"type": "object", "properties": properties, "required": names, **more}


def json_content(schema: dict[str, Any], **examples: object) -> dict[str, Any]:
    content = {"schema": schema}
    if examples:
        content["examples"] = {name: {"value": value} for name, value in examples.items()}
    return {"application/json": content}


ID = integer(1, MAX_ID, examples=[1])
PENDING_SHARDS = {
    "type": "array",
    "items": integer(0, 23),
    "minItems": 1,
    "description": "shards, by number from 0, in which it is not in force yet",
}
# One line without control characters, and something in it that is seen.
ONE_LINE = rf"^[^{CONTROLS}]*[^{INVISIBLE}{CONTROLS}][^{CONTROLS}]*$"
TIME = {"type": ["string", "null"], "format": "date-time"}
PRICE = integer(
    0, MAX_ID, "in the currency's minor unit by ISO 4217: 1500 is JPY 1500, USD 15.00, KWD 1.500"
)
CURRENCY = {
    "type": "string",
    "pattern": "^[A-Z]{3}$",
    "description": "ISO 4217, with a minor unit (no gold, XAU, and no XXX)",
}
USER = {
    "description": 'a shopper by the shop\'s own name: `42` and `"42"` are the same one; any other '
    "text is itself, byte for byte",
    "anyOf": [
        {"type": "integer", "minimum": 1, "maximum": MAX_ID},
        {
            "type": "string",
            "minLength": 1,
            "maxLength": 64,
            "pattern": r"^[A-Za-z0-9._~:@|+-]+$",
            "not": {"enum": [".", ".."]},
        },
    ],
}
REFERENCE = {
    "type": "string",
    "minLength": 1,
    "maxLength": 64,
    "pattern": r"^[\x21-\x7e]+$",
    "description": "the shop's own name for the order, such as a cart",
}

# The terms of sale; which of them are required, and what they are without being told, is said where
# they are used.
TERMS = {
    "name": {"type": "string", "minLength": 1, "maxLength": 200, "pattern": ONE_LINE},
    "priceCents": PRICE,
    "currency": CURRENCY,
    "opensAt": TIME | {"description": "RFC 3339 with offset; null: open"},
    "closesAt": TIME | {"description": "after `opensAt`; null: never"},
    "perUserLimit": {
        "type": ["integer", "null"],
        "minimum": 1,
        "maximum": MAX_QUANTITY,
        "description": "units that one user may buy in all",
    },
    "maxQuantity": integer(1, MAX_QUANTITY, "units in one purchase"),
    "paused": {"type": "boolean"},
    "holdSeconds": {
        "type": ["integer", "null"],
        "minimum": MIN_HOLD_SECONDS,
        "maximum": MAX_HOLD_SECONDS,
        "description": "an order is held so long for its payment; null: it is sold at once",
    },
    "sku": {
        "type": ["string", "null"],
        "minLength": 1,
        "maxLength": 64,
        "pattern": r"^[\x21-\x7e]+$",
        "description": "the shop's own name for the product; no other one has it",
    },
    "visibility": {
        "enum": ["draft", "hidden", "listed"],
        "description": "`draft`: to shoppers it is unknown. `hidden`: shown nowhere, but who knows "
        "its id can buy it",
    },
    "archived": {
        "type": "boolean",
        "description": "it sells nothing, to shoppers it is unknown; its orders and ledger stay",
    },
}

SCHEMAS = {
    "Error": json_object(
        {
            "error": {"type": "string", "description": "for people"},
            "code": {"type": "string", "description": "for programs", "pattern": "^[a-z_]+$"},
            "field": {"type": "string", "description": "the part of the request that is wrong"},
            "remaining": integer(1, MAX_STOCK, "with `insufficient_stock`: the units left"),
            "opensAt": {
                "type": "string",
                "format": "date-time",
                "description": "with `not_open`: when the sale opens",
            },
            "priceCents": PRICE | {"description": "with `price_changed`: the price in force"},
            "currency": CURRENCY | {"description": "with `price_changed`"},
            "orderId": ID | {"description": "with `order_ended`: the order of this key"},
            "orderStatus": {
                "enum": ["CANCELLED", "RELEASED", "EXPIRED", "FAILED"],
                "description": "with `order_ended`: what became of it",
            },
            "mayReturn": {
                "type": "boolean",
                "description": "with `sold_out` and `insufficient_stock`: orders are held, whose "
                "units may come back; up to 2 s old",
            },
            "final": {
                "type": "boolean",
                "description": "with `sold_out` and `insufficient_stock`: false while a part of "
                "the sale is out of reach, whose units come back with it",
            },
            "reason": {
                "enum": ["purchase_limit"],
                "description": "with `hold_expired`: the user has bought too many since",
            },
            "limit": {
                "type": "string",
                "description": "with `rate_limited`: which limit, as in `RateLimit-Policy`; of "
                "purchases `user`, `early` (attempts before the sale opens or while it is paused), "
                "`address` or `network`. With `purchase_limit`: `address`",
                "pattern": "^[a-z_]+$",
            },
            "executed": {
                "type": "boolean",
                "description": "false: nothing happened for sure; absent: nobody can tell",
            },
            "product": ref("schemas", "Product")
            | {"description": "with `stale_version`: the product as it stands"},
            "scope": {"type": "string", "description": "with `forbidden`: what the token lacks"},
            "orders": integer(0, MAX_ID, "with `count_changed`: so many orders there are"),
            "units": integer(0, MAX_ID, "with `count_changed`: so many units that stand"),
            "throughOrderId": integer(0, MAX_ID, "with `count_changed`: up to this order"),
            "queued": {
                "type": "array",
                "items": ref("schemas", "Order"),
                "description": "the orders that are known although the list is incomplete",
            },
        },
        ["error", "code"],
    ),
    "Purchase": json_object(
        {
            "userId": USER | {"examples": [1, "auth0|7f3a"]},
            "productId": integer(1, MAX_ID, "what", examples=[1]),
            "quantity": integer(
                1, MAX_QUANTITY, "units; at most the product's `maxQuantity`", default=1
            ),
            "expectedPriceCents": PRICE
            | {
                "type": ["integer", "null"],
                "description": "the price that the shopper was shown: another one in force is "
                "refused as `price_changed`",
            },
            "reference": REFERENCE | {"type": ["string", "null"]},
        },
        ["userId", "productId"],
    ),
    "Purchased": json_object(
        {
            "status": {"enum": ["queued", "held"]},
            "orderId": ID,
            "heldUntil": {
                "type": "string",
                "format": "date-time",
                "description": "with `held`: confirmed until then it is sold",
            },
            "unitPriceCents": PRICE
            | {"description": "absent in replays of orders that version 0.1.0 took"},
            "currency": CURRENCY,
        },
        ["status", "orderId"],
    ),
    "Order": json_object(
        {
            "id": ID,
            "status": {
                "enum": list(ORDER_STATUSES),
                "description": "`QUEUED` until stored; `FAILED` while a person has to decide, "
                "`CANCELLED` once that person gave it up; `HELD` from the claim on until it is "
                "paid for",
            },
            "heldUntil": {
                "type": "string",
                "format": "date-time",
                "description": "with `HELD`: until when",
            },
            "quantity": integer(1, MAX_QUANTITY),
            "productId": ID,
            "createdAt": {"type": "string", "format": "date-time"},
            "unitPriceCents": PRICE,
            "currency": CURRENCY,
            "reference": REFERENCE,
            "cancelledQuantity": integer(
                1, MAX_QUANTITY, "units of it that were given back; absent while there are none"
            ),
        },
        [
            "id",
            "status",
            "quantity",
            "productId",
            "createdAt",
            "unitPriceCents",
            "currency",
        ],
    ),
    "Metrics": json_object(
        {
            "stock_remaining": integer(0, MAX_ID, "units free to be sold"),
            "queue_depth": integer(0, MAX_ID, "orders claimed, not yet stored"),
            "total_processed": integer(0, MAX_ID, "orders stored"),
        }
    ),
    "NewProduct": json_object(
        TERMS
        | {
            "maxQuantity": TERMS["maxQuantity"] | {"default": 10},
            "paused": TERMS["paused"] | {"default": False},
            "visibility": TERMS["visibility"] | {"default": "listed"},
            "archived": TERMS["archived"] | {"default": False},
            "stock": integer(0, MAX_STOCK, "the units on sale at first"),
        },
        ["name", "priceCents", "currency", "stock"],
        additionalProperties=False,
    ),
    # No defaults: a client that fills them in would change what it was not asked to.
    "ProductChange": json_object(TERMS, [], additionalProperties=False),
    "Product": json_object(
        {
            "id": ID,
            **TERMS,
            "stockRemaining": integer(0, MAX_ID, "units free to be sold"),
            "braked": {
                "type": "boolean",
                "description": "a brake is set: refused as `paused`, whatever `paused` is",
            },
            "currencyDigits": integer(
                0, 4, "of the minor unit: divide amounts by ten to this power to show them"
            ),
        }
    ),
    "Brake": json_object(
        {
            "on": {"type": "boolean", "description": "true stops selling, false lets it go on"},
            "productId": {
                "type": ["integer", "null"],
                "minimum": 1,
                "maximum": MAX_ID,
                "description": "absent or null: every product, later ones included",
            },
        },
        ["on"],
        additionalProperties=False,
    ),
    # As it is answered while shards are out of reach.
    "ProductPending": {
        "allOf": [ref("schemas", "Product"), json_object({"pendingShards": PENDING_SHARDS})]
    },
    "BrakedPending": {
        "allOf": [ref("schemas", "Braked"), json_object({"pendingShards": PENDING_SHARDS})]
    },
    "Braked": json_object(
        {
            "on": {"type": "boolean"},
            "products": integer(0, MAX_ID, "how many products this brake is for"),
            "saleBraked": {"type": "boolean", "description": "the whole sale's brake is set"},
            "stillBraked": {
                "type": "array",
                "items": ID,
                "description": "products that have a brake of their own",
            },
        }
    ),
    "Restock": json_object(
        {
            "productId": ID,
            "amount": integer(1, MAX_RESTOCK, "units to add", examples=[50]),
            "reason": {
                "type": ["string", "null"],
                "minLength": 1,
                "maxLength": 500,
                "pattern": ONE_LINE,
            },
        },
        ["productId", "amount"],
        additionalProperties=False,
    ),
    "Restocked": json_object(
        {
            "productId": ID,
            "amount": integer(1, MAX_RESTOCK),
            "stock_remaining": integer(0, MAX_ID, "units free right after it"),
        }
    ),
    "Selling": json_object(
        {
            "status": {"enum": ["ok", "unavailable"]},
            "unverified": {
                "type": "boolean",
                "description": "true: it sells, and could not yet compare the sale with PostgreSQL",
            },
            "reason": {"type": "string", "description": "why it can't sell"},
        },
        ["status"],
    ),
    "Health": json_object(
        {
            "status": {"enum": ["ok", "unavailable"]},
            "checks": {
                "type": "object",
                "additionalProperties": json_object(
                    {"ok": {"type": "boolean"}, "state": {"type": "string"}}
                ),
            },
        }
    ),
}

PRODUCT = {
    "id": 1,
    "name": "Flash-sale item",
    "priceCents": 99_999,
    "currency": "USD",
    "opensAt": "2026-11-27T09:00:00.000Z",
    "closesAt": None,
    "perUserLimit": 2,
    "maxQuantity": 10,
    "paused": False,
    "holdSeconds": None,
    "sku": "LAMP-1",
    "visibility": "listed",
    "archived": False,
    "stockRemaining": 100,
    "braked": False,
    "currencyDigits": 2,
}
ORDER = {
    "id": 17,
    "status": "CONFIRMED",
    "quantity": 1,
    "productId": 1,
    "createdAt": "2026-11-27T09:00:00.042Z",
    "unitPriceCents": 99_999,
    "currency": "USD",
}

HEADERS = {
    "RateLimit-Policy": (
        r'^"[a-z_]+";q=\d+;w=\d+$',
        '"user";q=5;w=60',
        "the limit that was applied: so many requests (q) in so many seconds (w); "
        "draft-ietf-httpapi-ratelimit-headers-10",
    ),
    "RateLimit": (
        r'^"[a-z_]+";r=\d+;t=\d+$',
        '"user";r=3;t=20',
        "requests left (r), and seconds until there is one more (t)",
    ),
    "Retry-After": (r"^\d+$", "20", "seconds to wait before the next attempt"),
    "X-Request-Id": (
        "^[!-~]{1,128}$",
        "checkout-7f3a",
        "the request's id: the client's, else one given here",
    ),
    "Idempotent-Replayed": ("^true$", "true", "the answer of an earlier request with this key"),
    "ETag": (r'^"[0-9]+"$', '"7"', "the version of the product's terms, for `If-Match`"),
    "Link": (
        '^<[^>]+>; rel="next"$',
        '</products?after=1000>; rel="next"',
        "where the list goes on (RFC 8288); absent on its last page",
    ),
    "Location": (
        "^/(products|orders/bulk-cancels|webhooks)/[0-9]+$",
        "/products/2",
        "what was made",
    ),
    "WWW-Authenticate": ("^Bearer ", 'Bearer realm="shop"', "what is asked for (RFC 6750)"),
}
LIMIT_HEADERS = ("RateLimit-Policy", "RateLimit")

# Each error by its code: the message, and what else its body holds.
ERRORS: dict[str, tuple[str, dict[str, Any]]] = {
    "invalid_request": ("quantity must be an integer", {"field": "quantity"}),
    "unauthorized": ("A valid API token is required", {}),
    "forbidden": ("The token is another shopper's", {}),
    "unknown_product": ("Unknown product", {}),
    "unknown_order": ("Unknown order", {}),
    "already_cancelled": ("This order is cancelled already", {}),
    "already_released": ("This order is released already", {}),
    "too_many_units": ("2 of this order's 3 units are left", {}),
    "order_failed": ("This order could not be stored; somebody decides on it", {}),
    "not_held": ("This order was never held", {}),
    "already_confirmed": ("This order is confirmed with another payment", {}),
    "already_extended": ("This order's hold was extended already", {}),
    "hold_expired": ("The hold has ended, and its units are gone", {"reason": "purchase_limit"}),
    "order_confirmed": ("This order is confirmed", {}),
    "order_cancelled": ("This order is cancelled", {}),
    "order_held": ("An order that is held can only be released as a whole", {}),
    "order_released": ("This order is released", {}),
    "order_expired": ("This order is expired", {}),
    "conflicting_intent": ("Something else was asked of this order before", {}),
    "count_changed": (
        "There are 12000 such orders now",
        {"orders": 12_000, "units": 16_430, "throughOrderId": 12_040},
    ),
    "not_found": ("Not Found", {}),
    "sold_out": ("Stock problem", {}),
    "insufficient_stock": ("Stock problem", {"remaining": 2}),
    "not_open": ("Sale not open", {"opensAt": "2026-11-27T09:00:00.000Z"}),
    "paused": ("Sale not open", {}),
    "ended": ("Sale not open", {}),
    "purchase_limit": ("Purchase limit reached", {}),
    "price_changed": ("Price changed", {"priceCents": 99_999, "currency": "USD"}),
    "order_ended": ("Order ended", {"orderId": 17, "orderStatus": "CANCELLED"}),
    "request_timeout": ("The body did not come in time", {}),
    "head_too_large": (
        "The request's head is larger than 64 KiB or has more than 100 headers",
        {},
    ),
    "body_too_large": ("The body is larger than 16 KiB", {}),
    "unsupported_media_type": ("Content-Type must be application/json", {}),
    "other_sale": ("The cursor is from another sale, before a reset", {}),
    "cursor_ahead": ("The cursor is ahead of the feed, which has lost events", {}),
    "cursor_expired": ("The events after this cursor are no longer kept", {}),
    "no_sale": ("There is no sale yet", {}),
    "too_many_endpoints": ("There are 100 endpoints, the most there can be", {}),
    "unknown_webhook": ("Unknown webhook endpoint or delivery", {}),
    "secret_unreadable": ("SECRET_KEY was changed since: make a new secret", {}),
    "stale_version": ("The product was changed meanwhile", {"product": PRODUCT}),
    "sku_taken": ("Another product has this sku", {}),
    "currency_fixed": ("The currency is fixed: there are orders in it", {}),
    "idempotency_mismatch": ("Idempotency-Key was used with another request", {}),
    "rate_limited": ("Too many requests", {"limit": "user"}),
    "internal_error": ("Internal server error", {}),
    "unavailable": ("Service unavailable", {}),
}
STATUSES = {
    400: ("The request is malformed or out of range", ["invalid_request"], ()),
    401: ("No valid token", ["unauthorized"], ("WWW-Authenticate",)),
    403: ("The token is not for this", ["forbidden"], ("WWW-Authenticate",)),
    404: ("There is no such product", ["unknown_product", "not_found"], ()),
    408: ("The body did not come within 10 s", ["request_timeout"], ()),
    409: (
        "The product no longer has a version that `If-Match` names, and `product` is what it is "
        "now; another product has the sku; or there are orders in the currency that it has",
        ["stale_version", "sku_taken", "currency_fixed"],
        ("ETag",),
    ),
    413: ("The body is larger than 16 KiB", ["body_too_large"], ()),
    415: ("The body is not application/json, or compressed", ["unsupported_media_type"], ()),
    422: ("The Idempotency-Key was used with another request", ["idempotency_mismatch"], ()),
    429: ("Too many requests; this one did nothing", ["rate_limited"], ("Retry-After",)),
    431: ("The head is larger than 64 KiB or has more than 100 headers", ["head_too_large"], ()),
    500: ("A fault of the server's: the outcome is unknown", ["internal_error"], ()),
    503: (
        "A server behind this one can't be reached: the outcome is unknown, unless `executed` says "
        "that nothing happened",
        ["unavailable"],
        ("Retry-After",),
    ),
}


def _header_refs(names: tuple[str, ...]) -> dict[str, Any]:
    return {name: ref("headers", name) for name in (*names, "X-Request-Id")}


def ok(
    meaning: str, content: dict[str, Any], headers: tuple[str, ...] = LIMIT_HEADERS
) -> dict[str, Any]:
    return {"description": meaning, "headers": _header_refs(headers), "content": content}


# What a status means, the codes it comes with, and its headers.
Response = tuple[str, Sequence[str], tuple[str, ...]]


def failures(*statuses: int, **changed: Response) -> dict[str, Any]:
    """Return the responses of an operation's errors; `changed` maps "s409" to another entry."""
    responses = {}
    for status in sorted({*statuses, 500}):
        meaning, codes, headers = changed.get(f"s{status}") or STATUSES[status]
        if 429 in statuses:
            # Whatever the answer is, it tells the limit that the request has passed.
            headers = (*LIMIT_HEADERS, *headers)
        examples = {
            code: {"error": ERRORS[code][0], "code": code, **ERRORS[code][1]} for code in codes
        }
        responses[str(status)] = {
            "description": meaning,
            "headers": _header_refs(headers),
            "content": json_content(ref("schemas", "Error"), **examples),
        }
    return responses


def parameter(name: str, where: str, schema: dict[str, Any], meaning: str) -> dict[str, Any]:
    return {
        "name": name,
        "in": where,
        "required": where == "path",
        "schema": schema,
        "description": meaning,
    }


KEY = parameter(
    "Idempotency-Key",
    "header",
    {"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[!-~]+$"},
    "One for each intent, such as a UUID; kept as long as the sale.",
)
RESTOCK_KEY = KEY | {"description": "One for each intent, such as a UUID; it is never forgotten."}
CREATION_KEY = KEY | {
    "description": "One for each intent, such as a UUID; kept for 30 days. Sent again, it makes "
    "nothing anew: the first answer comes again, with `Idempotent-Replayed`.",
}
IF_MATCH = parameter(
    "If-Match",
    "header",
    {"type": "string", "pattern": r'^\*$|^(W/)?"[0-9]{1,18}"(, *(W/)?"[0-9]{1,18}")*$'},
    "The ETag of the product that the change was made for. If the product was changed since, the"
    " answer is 409 and nothing happens. Without it, or with `*`, the change is made in any case.",
)
REQUEST_ID = parameter(
    "X-Request-Id", "header", {"type": "string"}, "1 to 128 of A-Z a-z 0-9 . _ : / + = -"
)
PRODUCT_ID = parameter("productId", "path", ID, "")


def body(schema: str, **examples: object) -> dict[str, Any]:
    return {"required": True, "content": json_content(ref("schemas", schema), **examples)}


def operation(
    tag: str, name: str, summary: str, responses: dict[str, Any], **more: object
) -> dict[str, Any]:
    return {"tags": [tag], "operationId": name, "summary": summary, **more, "responses": responses}
