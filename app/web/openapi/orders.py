"""The shop's own programs and their orders: operations and schemas."""

from typing import Any

from ...models import MAX_HOLD_SECONDS
from ...orders.listing import MOST_ORDERS, PAGE_ORDERS
from ...orders.search import STATUSES
from ...reading import MAX_ID, MAX_QUANTITY, MAX_REASON
from .components import (
    CREATION_KEY,
    CURRENCY,
    ID,
    LIMIT_HEADERS,
    ONE_LINE,
    PRICE,
    REFERENCE,
    REQUEST_ID,
    TIME,
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

READ: list[dict[str, list[str]]] = [{"admin": ["orders:read"]}]
WRITE: list[dict[str, list[str]]] = [{"admin": ["orders:write"]}]

USER_TEXT = {
    "type": "string",
    "minLength": 1,
    "maxLength": 64,
    "description": "the shopper, always as a text",
}
REASON = {"type": "string", "minLength": 1, "maxLength": MAX_REASON, "pattern": ONE_LINE}
OR_NONE = {"type": ["string", "null"]}
STATUS = {
    "enum": list(STATUSES),
    "description": "`QUEUED` until stored; `FAILED` while a person has to decide; `HELD` until it "
    "is paid for, given up (`RELEASED`) or too late (`EXPIRED`); `CANCELLED` once no unit is left",
}
BULK_FILTER = {
    "productId": ID | {"description": "whose orders"},
    "userId": {"anyOf": [*USER["anyOf"], {"type": "null"}], "description": "of this shopper alone"},
    "reference": REFERENCE | OR_NONE | {"description": "of this reference alone"},
    "claimedFrom": TIME | {"description": "claimed at this time or later"},
    "claimedUntil": TIME | {"description": "claimed before this time"},
}
THROUGH = integer(0, MAX_ID, "orders with a higher id are left alone: they were sold later")

SCHEMAS = {
    "ShopOrder": json_object(
        {
            "id": ID,
            "status": STATUS,
            "userId": USER_TEXT,
            "productId": ID,
            "productName": OR_NONE
            | {"description": "as it was called when it was sold; null for one that nobody knows"},
            "quantity": integer(1, MAX_QUANTITY, "units that were bought; it never changes"),
            "cancelledQuantity": integer(0, MAX_QUANTITY, "units of them that were given back"),
            "unitPriceCents": PRICE,
            "currency": CURRENCY,
            "reference": REFERENCE | OR_NONE,
            "createdAt": {"type": "string", "format": "date-time"},
            "storedAt": TIME | {"description": "null while it waits in Redis"},
            "endedAt": TIME | {"description": "when the last unit was given back"},
            "endReason": OR_NONE | {"description": "why"},
            "heldUntil": TIME | {"description": "of an order that is held, or was"},
            "payment": OR_NONE | {"description": "what paid for an order that was held"},
            "confirming": {
                "type": "boolean",
                "description": "it is paid, and confirmed as soon as it is stored",
            },
            "extending": integer(
                1, MAX_HOLD_SECONDS, "seconds that are added as soon as it is stored"
            ),
            "reclaimed": {
                "type": "boolean",
                "description": "it was paid after its hold had ended, and got its units anew",
            },
            "cancelling": integer(
                1, MAX_QUANTITY, "units that are given back as soon as the order is stored"
            ),
        },
        [
            "id",
            "status",
            "userId",
            "productId",
            "productName",
            "quantity",
            "cancelledQuantity",
            "unitPriceCents",
            "currency",
            "reference",
            "createdAt",
            "storedAt",
            "endedAt",
            "endReason",
            "heldUntil",
            "payment",
        ],
    ),
    "ShopOrders": json_object(
        {
            "orders": {
                "type": "array",
                "items": ref("schemas", "ShopOrder"),
                "maxItems": MOST_ORDERS,
            },
            "next": OR_NONE | {"description": "the `cursor` that goes on; null on the last page"},
        }
    ),
    "Cancel": json_object(
        {
            "quantity": {
                "type": ["integer", "null"],
                "minimum": 1,
                "maximum": MAX_QUANTITY,
                "description": "units to give back; absent or null: all that are left",
            },
            "reason": REASON,
        },
        ["reason"],
        additionalProperties=False,
    ),
    "BulkCancel": json_object(
        BULK_FILTER
        | {
            "orders": integer(
                1, MAX_ID, "how many orders that are, exactly: a dry run tells. Not in a dry run"
            ),
            "throughOrderId": {
                "type": ["integer", "null"],
                "minimum": 0,
                "maximum": MAX_ID,
                "description": "as the dry run told: orders with a higher id are left alone",
            },
            "reason": REASON | {"description": "not in a dry run"},
            "dryRun": {"type": "boolean", "description": "only count them"},
        },
        ["productId"],
        additionalProperties=False,
    ),
    "BulkCancelPlan": json_object(
        {
            "orders": integer(0, MAX_ID, "orders that would be cancelled"),
            "units": integer(0, MAX_ID, "units that would go back on sale"),
            "throughOrderId": THROUGH,
        }
    ),
    "BulkCancelled": json_object(
        {
            "id": ID,
            "status": {"enum": ["running", "done", "stopped"]},
            "productId": ID,
            "userId": OR_NONE,
            "reference": REFERENCE | OR_NONE,
            "claimedFrom": TIME,
            "claimedUntil": TIME,
            "throughOrderId": THROUGH,
            "orders": integer(0, MAX_ID, "orders that there were at the beginning"),
            "cancelledOrders": integer(0, MAX_ID, "cancelled so far"),
            "cancelledUnits": integer(0, MAX_ID, "units given back so far"),
            "reason": {"type": "string"},
            "createdAt": {"type": "string", "format": "date-time"},
            "finishedAt": TIME,
        }
    ),
}

ORDER = {
    "id": 17,
    "status": "CONFIRMED",
    "userId": "auth0|7f3a",
    "productId": 1,
    "productName": "Lamp",
    "quantity": 3,
    "cancelledQuantity": 1,
    "unitPriceCents": 99_999,
    "currency": "USD",
    "reference": "cart-4711",
    "createdAt": "2026-11-27T09:00:00.042Z",
    "storedAt": "2026-11-27T09:00:00.180Z",
    "endedAt": None,
    "endReason": None,
    "heldUntil": None,
    "payment": None,
}
WAITING = ORDER | {"status": "QUEUED", "cancelledQuantity": 0, "storedAt": None, "cancelling": 3}
BULK = {
    "id": 3,
    "status": "running",
    "productId": 1,
    "userId": None,
    "reference": None,
    "claimedFrom": None,
    "claimedUntil": None,
    "throughOrderId": 12_040,
    "orders": 12_000,
    "cancelledOrders": 4_500,
    "cancelledUnits": 6_210,
    "reason": "the supplier can't deliver",
    "createdAt": "2026-11-27T12:00:00.000Z",
    "finishedAt": None,
}
PLAN = {"orders": 12_000, "units": 16_430, "throughOrderId": 12_040}

UNKNOWN_ORDER = ("There is no such order", ["unknown_order", "not_found"], ())
UNKNOWN_BULK = ("There is no such bulk cancel", ["not_found"], ())
NOT_CANCELLED = (
    "Not cancelled: `code` tells why",
    (
        "already_cancelled", "already_released", "too_many_units", "order_failed", "order_held",
        "order_released", "order_expired", "conflicting_intent",
    ),
    (),
)  # fmt: skip
COUNT_CHANGED = (
    "There are not as many such orders as was said: nothing was done; the body says what there is",
    ["count_changed"],
    (),
)
ORDER_ID = parameter("orderId", "path", ID, "")
BULK_ID = parameter("bulkId", "path", ID, "")


def paths() -> dict[str, Any]:
    order = ref("schemas", "ShopOrder")
    bulk = json_content(ref("schemas", "BulkCancelled"), running=BULK)
    return {
        "/orders": {
            "get": operation(
                "Orders",
                "findOrders",
                "Orders, newest first",
                {
                    "200": ok(
                        "A page of orders; those of the last moment included",
                        json_content(
                            ref("schemas", "ShopOrders"), page={"orders": [ORDER], "next": "17"}
                        ),
                    ),
                    **failures(400, 401, 403, 429, 503),
                },
                security=READ,
                parameters=[
                    parameter("userId", "query", USER, "of this shopper"),
                    parameter("reference", "query", REFERENCE, "of this reference, all of it"),
                    parameter("productId", "query", ID, "of this product"),
                    parameter("status", "query", STATUS, "in this state"),
                    parameter(
                        "limit",
                        "query",
                        integer(1, MOST_ORDERS, default=PAGE_ORDERS),
                        "at most so many",
                    ),
                    parameter(
                        "cursor",
                        "query",
                        {"type": "string", "pattern": "^[0-9]{1,16}$"},
                        "`next` of the page before",
                    ),
                    REQUEST_ID,
                ],
            )
        },
        "/orders/{orderId}": {
            "get": operation(
                "Orders",
                "showOrder",
                "One order",
                {
                    "200": ok("The order", json_content(order, order=ORDER, waiting=WAITING)),
                    **failures(401, 403, 404, 429, 503, s404=UNKNOWN_ORDER),
                },
                security=READ,
                parameters=[ORDER_ID, REQUEST_ID],
            )
        },
        "/orders/{orderId}/cancel": {
            "post": operation(
                "Orders",
                "cancelOrder",
                "Give an order back, whole or in part",
                {
                    "200": ok(
                        "Given back: the order as it is now. Its units are on sale again at once, "
                        "or as soon as Redis is back",
                        json_content(order, part=ORDER),
                        (*LIMIT_HEADERS, "Idempotent-Replayed"),
                    ),
                    "202": ok(
                        "Accepted: the order waits to be stored, and is given back then",
                        json_content(order, waiting=WAITING),
                        (*LIMIT_HEADERS, "Idempotent-Replayed"),
                    ),
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
                        s404=UNKNOWN_ORDER,
                        s409=NOT_CANCELLED,
                    ),
                },
                security=WRITE,
                parameters=[ORDER_ID, CREATION_KEY, REQUEST_ID],
                requestBody=body(
                    "Cancel",
                    whole={"reason": "returned"},
                    part={"quantity": 1, "reason": "one was broken"},
                ),
            )
        },
        "/orders/bulk-cancels": {
            "post": operation(
                "Orders",
                "startBulkCancel",
                "Cancel all orders of a product, or those of a filter",
                {
                    "200": ok(
                        "A dry run: what would be cancelled",
                        json_content(ref("schemas", "BulkCancelPlan"), plan=PLAN),
                    ),
                    "202": ok(
                        "Begun: a worker cancels them, some hundreds at a time",
                        bulk,
                        (*LIMIT_HEADERS, "Location", "Idempotent-Replayed"),
                    ),
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
                        s409=COUNT_CHANGED,
                    ),
                },
                description="First a dry run, then the same with the `orders` and "
                "`throughOrderId` that it told. Orders that are held are released.",
                security=WRITE,
                parameters=[CREATION_KEY, REQUEST_ID],
                requestBody=body(
                    "BulkCancel",
                    dry_run={"productId": 1, "dryRun": True},
                    begin={
                        "productId": 1,
                        "orders": 12_000,
                        "throughOrderId": 12_040,
                        "reason": "the supplier can't deliver",
                    },
                ),
            )
        },
        "/orders/bulk-cancels/{bulkId}": {
            "get": operation(
                "Orders",
                "showBulkCancel",
                "How far a bulk cancel is",
                {
                    "200": ok("The bulk cancel", bulk),
                    **failures(401, 403, 404, 429, 503, s404=UNKNOWN_BULK),
                },
                security=READ,
                parameters=[BULK_ID, REQUEST_ID],
            ),
            "delete": operation(
                "Orders",
                "stopBulkCancel",
                "Let no further batch begin",
                {
                    "200": ok("The bulk cancel, which has ended", bulk),
                    **failures(401, 403, 404, 429, 503, s404=UNKNOWN_BULK),
                },
                description="What is cancelled stays so. Sent again, it changes nothing more.",
                security=WRITE,
                parameters=[BULK_ID, REQUEST_ID],
            ),
        },
    }
