"""The operations of the feed and of webhooks."""

from typing import Any

from ...events import TYPES
from ...feed.webhooks import MOST_DESCRIPTION, MOST_ENDPOINTS, MOST_URL
from .components import (
    CREATION_KEY,
    ID,
    LIMIT_HEADERS,
    ONE_LINE,
    REQUEST_ID,
    Response,
    failures,
    integer,
    json_content,
    json_object,
    ok,
    operation,
    parameter,
    ref,
)
from .orders import ORDER

ADMIN: list[dict[str, list[str]]] = [{"admin": []}]
MOMENT = {"type": "string", "format": "date-time"}
CURSOR = {"type": "string", "pattern": "^[0-9a-zA-Z]{1,32}-[0-9]{1,18}$"}
ENDPOINT_ID = parameter("endpointId", "path", integer(1, 2**31 - 1, examples=[1]), "")
DELIVERY_ID = parameter("deliveryId", "path", ID, "")
EPOCH = "3f9c2a7b5d1e8f04"

EVENT = {
    "id": f"{EPOCH}-1042",
    "type": "order.cancelled",
    "at": "2026-11-27T09:14:07.120Z",
    "sequence": 1,
    "order": ORDER | {"status": "CANCELLED", "cancelledQuantity": 3},
    "units": 1,
    "reason": "asked for",
}
ENDPOINT = {
    "id": 1,
    "url": "https://shop.example/hooks/flash-sale",
    "types": ["order.confirmed", "order.cancelled"],
    "description": "the shop's back end",
    "enabled": True,
    "offReason": None,
    "after": f"{EPOCH}-1042",
    "failures": 0,
    "failingSince": None,
    "nextAttemptAt": None,
    "createdAt": "2026-11-20T08:00:00.000Z",
}
DELIVERY = {
    "id": 9,
    "messageId": "msg_2b7Yq0m5Xc1tW3uVzR8kPnLs",
    "kind": "events",
    "events": 100,
    "state": "delivered",
    "attempts": 1,
    "createdAt": "2026-11-27T09:14:07.300Z",
    "deliveredAt": "2026-11-27T09:14:07.340Z",
}
ATTEMPT = {
    "at": "2026-11-27T09:14:07.340Z",
    "milliseconds": 31,
    "status": 204,
    "error": None,
}
SECRET = {"secret": "whsec_" + "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="}

_ENDPOINT = {
    "url": {
        "type": "string",
        "format": "uri",
        "maxLength": MOST_URL,
        "description": "gets a POST; https alone in production, and no private address unless "
        "`WEBHOOK_ALLOW_PRIVATE` says so",
    },
    "types": {
        "type": "array",
        "items": {"enum": list(TYPES)},
        "description": "which events; all when empty",
    },
    "description": {
        "type": "string",
        "maxLength": MOST_DESCRIPTION,
        "pattern": f"^$|{ONE_LINE}",
    },
}
_AFTER = CURSOR | {
    "description": "the event after which it begins, where that is not now; later: the last one "
    "that is done with"
}
_NULL_MOMENT = {"type": ["string", "null"], "format": "date-time"}
_SHOWN = {
    "id": integer(1, 2**31 - 1),
    **_ENDPOINT,
    "enabled": {"type": "boolean"},
    "offReason": {
        "type": ["string", "null"],
        "description": "why it was switched off by itself",
    },
    "after": _AFTER,
    "failures": integer(0, 2**31 - 1, "attempts in a row that failed"),
    "failingSince": _NULL_MOMENT,
    "nextAttemptAt": _NULL_MOMENT | {"description": "while it fails"},
    "createdAt": MOMENT,
}
_DELIVERY = {
    "id": ID,
    "messageId": {"type": "string", "description": "the header `webhook-id`"},
    "kind": {"enum": ["events", "test"]},
    "events": integer(1, 100),
    "state": {"enum": ["waiting", "delivered", "failed"]},
    "attempts": integer(0, 2**31 - 1),
    "createdAt": MOMENT,
    "deliveredAt": _NULL_MOMENT,
}

SCHEMAS: dict[str, dict[str, Any]] = {
    "Event": json_object(
        {
            "id": CURSOR | {"description": "also the cursor after which the feed goes on"},
            "type": {"enum": list(TYPES)},
            "at": MOMENT,
            "sequence": integer(
                0, 2**31 - 1, "the order's own count of its steps: 0 when it was stored"
            ),
            "order": ref("schemas", "ShopOrder")
            | {"description": "the order as it was after this step"},
            "product": {
                "type": "object",
                "description": "of a product's event: id, name, freeUnits",
            },
            "units": integer(1, 2**53 - 1, "given back or put on sale by this step"),
            "reason": {"type": ["string", "null"]},
            "observed": {
                "type": "boolean",
                "description": "`product.sold_out` is what a look once a second has seen",
            },
        },
        ["id", "type", "at"],
    ),
    "Events": json_object(
        {
            "events": {"type": "array", "items": ref("schemas", "Event"), "maxItems": 1000},
            "next": CURSOR | {"description": "`after` of the next request"},
        }
    ),
    "NewWebhook": json_object(_ENDPOINT | {"after": _AFTER}, ["url"], additionalProperties=False),
    "WebhookChange": json_object(
        _ENDPOINT | {"enabled": {"type": "boolean"}}, [], additionalProperties=False
    ),
    "Webhook": json_object(_SHOWN),
    "WebhookWithSecret": json_object(
        _SHOWN
        | {
            "secret": {
                "type": "string",
                "pattern": "^whsec_",
                "description": "shown this once; signs every delivery (Standard Webhooks)",
            }
        }
    ),
    "Delivery": json_object(_DELIVERY),
    "DeliveryWithAttempts": json_object(
        _DELIVERY
        | {
            "attemptList": {
                "type": "array",
                "items": json_object(
                    {
                        "at": MOMENT,
                        "milliseconds": integer(0, 2**31 - 1),
                        "status": {"type": ["integer", "null"]},
                        "error": {"type": ["string", "null"]},
                    }
                ),
            }
        }
    ),
    "Nothing": json_object({}, [], additionalProperties=False),
}

UNKNOWN: Response = ("There is no such endpoint or delivery", ["unknown_webhook"], ())
GONE: Response = ("The events after the cursor are no longer kept", ["cursor_expired"], ())
OTHER: Response = (
    "The cursor is from another sale, or ahead of a feed that was restored from a copy: begin "
    "anew without `after`",
    ["other_sale", "cursor_ahead", "no_sale"],
    (),
)
FULL: Response = (
    f"There are {MOST_ENDPOINTS} endpoints, or the cursor is none of this sale",
    ["too_many_endpoints", "other_sale", "cursor_ahead", "no_sale"],
    (),
)
REMOVED: Response = (
    "A replay: the endpoint that was made is removed since",
    ["unknown_webhook"],
    (),
)
UNREADABLE: Response = (
    "A replay: `SECRET_KEY` was changed since, and the secret can't be told",
    ["secret_unreadable"],
    (),
)
KEYED = (*LIMIT_HEADERS, "Idempotent-Replayed")
BODY = (408, 413, 415, 422, 431)


def paths() -> dict[str, Any]:
    """Return the operations by path and method."""
    webhook = json_content(ref("schemas", "Webhook"), webhook=ENDPOINT)
    secret = json_content(ref("schemas", "WebhookWithSecret"), webhook=ENDPOINT | SECRET)
    delivery = json_content(ref("schemas", "Delivery"), delivery=DELIVERY)
    waiting = json_content(
        ref("schemas", "Delivery"),
        delivery=DELIVERY | {"state": "waiting", "attempts": 0, "deliveredAt": None},
    )
    empty = {
        "required": False,
        "content": json_content(ref("schemas", "Nothing"), nothing={}),
    }
    secured: dict[str, Any] = {"security": ADMIN}
    return {
        "/orders/events": {
            "get": operation(
                "Events",
                "followEvents",
                "What happened to orders and products",
                {
                    "200": ok(
                        "Events in their order, oldest first; `next` is `after` of the next "
                        "request",
                        json_content(
                            ref("schemas", "Events"),
                            events={"events": [EVENT], "next": EVENT["id"]},
                        ),
                    ),
                    **failures(400, 401, 403, 409, 410, 429, 503, s409=OTHER, s410=GONE),
                },
                description="Nothing is skipped: an event that is committed late has a later "
                "number. Store `next` together with what you did with the events. Events are kept "
                "for 30 days.",
                **secured,
                parameters=[
                    parameter("after", "query", CURSOR, "go on after this event"),
                    parameter("limit", "query", integer(1, 1000, default=100), "at most so many"),
                    parameter(
                        "wait",
                        "query",
                        integer(0, 20, default=0),
                        "seconds to wait where there is no event yet",
                    ),
                    REQUEST_ID,
                ],
            )
        },
        "/webhooks": {
            "get": operation(
                "Events",
                "listWebhooks",
                "The endpoints",
                {
                    "200": ok(
                        "All of them",
                        json_content(
                            {"type": "array", "items": ref("schemas", "Webhook")},
                            webhooks=[ENDPOINT],
                        ),
                    ),
                    **failures(401, 403, 429, 503),
                },
                **secured,
                parameters=[REQUEST_ID],
            ),
            "post": operation(
                "Events",
                "createWebhook",
                "Have events sent to an address",
                {
                    "201": ok("Created", secret, (*KEYED, "Location")),
                    **failures(
                        *(400, 401, 403, 404, *BODY, 409, 410, 429, 503),
                        s404=REMOVED,
                        s409=FULL,
                        s410=GONE,
                    ),
                },
                **secured,
                parameters=[CREATION_KEY, REQUEST_ID],
                requestBody={
                    "required": True,
                    "content": json_content(
                        ref("schemas", "NewWebhook"), all={"url": ENDPOINT["url"]}
                    ),
                },
            ),
        },
        "/webhooks/{endpointId}": {
            "get": operation(
                "Events",
                "showWebhook",
                "One endpoint",
                {
                    "200": ok("The endpoint", webhook),
                    **failures(401, 403, 404, 429, 503, s404=UNKNOWN),
                },
                **secured,
                parameters=[ENDPOINT_ID, REQUEST_ID],
            ),
            "patch": operation(
                "Events",
                "changeWebhook",
                "Change an endpoint, or switch it on or off",
                {
                    "200": ok("The endpoint", webhook),
                    **failures(400, 401, 403, 404, 408, 413, 415, 429, 431, 503, s404=UNKNOWN),
                },
                description="Switched on again it goes on where it was, as far as events are kept.",
                **secured,
                parameters=[ENDPOINT_ID, REQUEST_ID],
                requestBody={
                    "required": True,
                    "content": json_content(ref("schemas", "WebhookChange"), on={"enabled": True}),
                },
            ),
            "delete": operation(
                "Events",
                "deleteWebhook",
                "Remove an endpoint, and what was sent to it",
                {
                    "204": {
                        "description": "Removed",
                        "headers": {
                            name: ref("headers", name) for name in (*LIMIT_HEADERS, "X-Request-Id")
                        },
                    },
                    **failures(401, 403, 404, 429, 503, s404=UNKNOWN),
                },
                **secured,
                parameters=[ENDPOINT_ID, REQUEST_ID],
            ),
        },
        "/webhooks/{endpointId}/secret": {
            "post": operation(
                "Events",
                "rotateWebhookSecret",
                "Make a new secret",
                {
                    "200": ok("The new one; the former signs too for 24 hours", secret, KEYED),
                    **failures(
                        400, 401, 403, 404, *BODY, 409, 429, 503, s404=UNKNOWN, s409=UNREADABLE
                    ),
                },
                **secured,
                parameters=[ENDPOINT_ID, CREATION_KEY, REQUEST_ID],
                requestBody=empty,
            )
        },
        "/webhooks/{endpointId}/test": {
            "post": operation(
                "Events",
                "testWebhook",
                "Have a test event sent, once",
                {
                    "202": ok("On its way, also to an endpoint that is off", waiting, KEYED),
                    **failures(400, 401, 403, 404, *BODY, 429, 503, s404=UNKNOWN),
                },
                **secured,
                parameters=[ENDPOINT_ID, CREATION_KEY, REQUEST_ID],
                requestBody=empty,
            )
        },
        "/webhooks/{endpointId}/deliveries": {
            "get": operation(
                "Events",
                "listDeliveries",
                "What was sent to an endpoint",
                {
                    "200": ok(
                        "The newest first",
                        json_content(
                            {"type": "array", "items": ref("schemas", "Delivery")},
                            deliveries=[DELIVERY],
                        ),
                    ),
                    **failures(400, 401, 403, 404, 429, 503, s404=UNKNOWN),
                },
                **secured,
                parameters=[
                    ENDPOINT_ID,
                    parameter("limit", "query", integer(1, 100, default=50), "at most so many"),
                    parameter("before", "query", ID, "with a smaller id: the next page"),
                    REQUEST_ID,
                ],
            )
        },
        "/webhooks/{endpointId}/deliveries/{deliveryId}": {
            "get": operation(
                "Events",
                "showDelivery",
                "One delivery, with its attempts",
                {
                    "200": ok(
                        "The delivery",
                        json_content(
                            ref("schemas", "DeliveryWithAttempts"),
                            delivery=DELIVERY | {"attemptList": [ATTEMPT]},
                        ),
                    ),
                    **failures(401, 403, 404, 429, 503, s404=UNKNOWN),
                },
                **secured,
                parameters=[ENDPOINT_ID, DELIVERY_ID, REQUEST_ID],
            )
        },
        "/webhooks/{endpointId}/deliveries/{deliveryId}/redeliver": {
            "post": operation(
                "Events",
                "redeliver",
                "Have a delivery sent once more, with the same id and contents",
                {
                    "202": ok("On its way", delivery, KEYED),
                    **failures(400, 401, 403, 404, *BODY, 429, 503, s404=UNKNOWN),
                },
                **secured,
                parameters=[ENDPOINT_ID, DELIVERY_ID, CREATION_KEY, REQUEST_ID],
                requestBody=empty,
            )
        },
    }
