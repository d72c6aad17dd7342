"""Orders that are held until they are paid for: operations and schemas."""

from typing import Any

from ...models import MAX_HOLD_SECONDS
from ...orders.holds import MAX_PAYMENT
from .components import (
    CREATION_KEY,
    LIMIT_HEADERS,
    REQUEST_ID,
    body,
    failures,
    integer,
    json_content,
    json_object,
    ok,
    operation,
    ref,
)
from .orders import ORDER, ORDER_ID, REASON, UNKNOWN_ORDER, WRITE

SCHEMAS = {
    "Confirm": json_object(
        {
            "payment": {
                "type": ["string", "null"],
                "minLength": 1,
                "maxLength": MAX_PAYMENT,
                "pattern": "^[!-~]+$",
                "description": "the payment, as the shop or its provider calls it",
            }
        },
        [],
        additionalProperties=False,
    ),
    "Release": json_object(
        {"reason": REASON | {"type": ["string", "null"]}}, [], additionalProperties=False
    ),
    "Extend": json_object(
        {"seconds": integer(1, MAX_HOLD_SECONDS, "so much longer")}, additionalProperties=False
    ),
}

HELD = ORDER | {
    "status": "HELD",
    "cancelledQuantity": 0,
    "heldUntil": "2026-11-27T09:10:00.042Z",
}
PAID = HELD | {"status": "CONFIRMED", "payment": "pi_3MtwBw"}
RELEASED = HELD | {
    "status": "RELEASED",
    "cancelledQuantity": 3,
    "endedAt": "2026-11-27T09:03:11.500Z",
    "endReason": "the shopper went back",
}
ENDS = ("order_confirmed", "order_cancelled", "order_released", "order_expired")
STATUSES = (400, 401, 403, 404, 408, 409, 413, 415, 422, 429, 431, 503)


def paths() -> dict[str, Any]:
    return {
        "/orders/{orderId}/confirm": _act(
            "confirmOrder",
            "Say that a held order is paid",
            "Confirm",
            {"payment": "pi_3MtwBw"},
            PAID,
            HELD | {"storedAt": None, "confirming": True},
            ["not_held", "already_confirmed", "hold_expired", "order_cancelled", "order_failed",
             "conflicting_intent", "already_cancelled"],
            "What is still held is confirmed, however late. After its end the units are claimed "
            "anew, if there are any (`reclaimed`); else 409 `hold_expired`: give the money back. "
            "Sent again, with the same payment or none, it is 200.",
        ),
        "/orders/{orderId}/release": _act(
            "releaseOrder",
            "Give a hold up",
            "Release",
            {"reason": "the shopper went back"},
            RELEASED,
            HELD | {"storedAt": None, "cancelling": 3},
            ["not_held", "order_failed", "conflicting_intent", "already_released",
             "already_cancelled", *ENDS],
            "Its units are on sale again at once, exactly once. Of a hold that was given up, or "
            "has ended, it is 200 and changes nothing.",
        ),
        "/orders/{orderId}/extend": _act(
            "extendOrder",
            "Hold an order for longer, once",
            "Extend",
            {"seconds": 120},
            HELD,
            HELD | {"storedAt": None, "extending": 120},
            ["not_held", "order_failed", "conflicting_intent", "already_extended",
             "already_cancelled", *ENDS],
            "Not beyond one whole hold (the product's `holdSeconds`) from now.",
        ),
    }  # fmt: skip


def _act(
    name: str,
    summary: str,
    schema: str,
    example: dict[str, Any],
    done: dict[str, Any],
    waits: dict[str, Any],
    codes: list[str],
    description: str,
) -> dict[str, Any]:
    order = ref("schemas", "ShopOrder")
    headers = (*LIMIT_HEADERS, "Idempotent-Replayed")
    conflict = ("Not done: `code` tells why", codes, ())
    return {
        "post": operation(
            "Orders",
            name,
            summary,
            {
                "200": ok("Done: the order as it is now", json_content(order, done=done), headers),
                "202": ok(
                    "Accepted: the order waits to be stored, and it is done then",
                    json_content(order, waiting=waits),
                    headers,
                ),
                **failures(*STATUSES, s404=UNKNOWN_ORDER, s409=conflict),
            },
            description=description,
            security=WRITE,
            parameters=[ORDER_ID, CREATION_KEY, REQUEST_ID],
            requestBody=body(schema, one=example) | {"required": schema == "Extend"},
        )
    }
