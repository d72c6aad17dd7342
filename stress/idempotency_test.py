"""Idempotency: a key buys once, however often and however simultaneously it is sent."""

import uuid

from client import arguments, counted, fresh_user, run, rush

STOCK = 10
AT_ONCE = 50


def test(server, options, promises):
    patient, hasty = (first := fresh_user()), first + 1
    with server.product("Stress test: idempotency", STOCK) as product:
        print(f"One key twice, then one key {AT_ONCE} times at once:")
        purchase = {"userId": patient, "productId": product, "quantity": 1}
        key = str(uuid.uuid4())

        once, again = server.buy(purchase, key), server.buy(purchase, key)
        promises.check("first", "200 queued", once.outcome)
        promises.check("first is marked a replay", False, replayed(once))
        promises.check("second", "200 queued", again.outcome)
        promises.check("second is marked a replay", True, replayed(again))
        promises.check("second has the same body", once.raw.decode(), again.raw.decode())
        other = server.buy(purchase | {"quantity": 2}, key)
        promises.check("same key, another body", "422 idempotency_mismatch", other.outcome)
        promises.check("stock taken", 1, STOCK - server.stock(product))
        promises.check("orders of the user", 1, len(server.read(f"/purchase/orders/{patient}")))

        crowd = rush(server, [purchase | {"userId": hasty}] * AT_ONCE, key=str(uuid.uuid4()))
        promises.check("at once", f"{AT_ONCE} × 200 queued", counted(crowd))
        promises.check("distinct bodies", 1, len({answer.raw for answer in crowd}))
        promises.check("marked a replay", AT_ONCE - 1, sum(map(replayed, crowd)))
        promises.check("stock taken by both", 2, STOCK - server.stock(product))
        promises.check("orders of the user", 1, len(server.read(f"/purchase/orders/{hasty}")))

        fresh = server.buy(purchase, str(uuid.uuid4()))
        is_new = fresh.status == 200 and fresh.raw != once.raw and not replayed(fresh)
        promises.check("a new key is a new order", True, is_new)


def replayed(answer):
    return answer.headers.get("idempotent-replayed") == "true"


if __name__ == "__main__":
    run(test, arguments("One key twice, and many times at once: one order, one unit."))
