"""The rush: more shoppers than items, all at the same moment; exactly the stock is sold."""

import time

from client import arguments, counted, fresh_addresses, fresh_user, run, rush, wait_for

PERSIST_SECONDS = 30


def test(server, options, promises):
    sold = min(options.users, options.stock)
    users = range(first := fresh_user(), first + options.users)
    usual = [None] * options.users
    sources = fresh_addresses(options.users) if options.addresses else usual
    with server.product("Stress test: the rush", options.stock) as product:
        purchases = [{"userId": user, "productId": product, "quantity": 1} for user in users]
        answers = rush(server, purchases, sources=sources)
        done_at = time.perf_counter()
        metrics = wait_for(
            lambda: server.read(f"/purchase/metrics?productId={product}"),
            lambda seen: seen["total_processed"] >= sold and seen["queue_depth"] == 0,
            PERSIST_SECONDS,
        )
        persisted_ms = (time.perf_counter() - done_at) * 1000
        describe(answers, options, product, persisted_ms)

        expected = f"{sold} × 200 queued"
        if options.users > sold:
            expected += f", {options.users - sold} × 409 sold_out"
        promises.check("answers", expected, counted(answers))

        won = {
            (user, source): answer.body.get("orderId")
            for user, source, answer in zip(users, sources, answers, strict=True)
            if answer.status == 200
        }
        promises.check("distinct order ids", sold, len(set(won.values())))
        promises.check("total_processed", sold, metrics["total_processed"])
        promises.check("queue_depth", 0, metrics["queue_depth"])
        promises.check("stock_remaining", options.stock - sold, metrics["stock_remaining"])

        confirmed = 0
        for (user, source), number in won.items():
            orders = server.read(f"/purchase/orders/{user}", source)
            seen = [(order["id"], order["status"], order["quantity"]) for order in orders]
            confirmed += seen == [(number, "CONFIRMED", 1)]
        promises.check("winners with their order CONFIRMED", sold, confirmed)


def describe(answers, options, product, persisted_ms):
    sent = [answer.sent_at for answer in answers]
    took = sorted((answer.answered_at - answer.sent_at) * 1000 for answer in answers)
    print(
        f"{options.users} shoppers, {options.stock} items (product {product}): "
        f"sent within {(max(sent) - min(sent)) * 1000:.1f} ms, "
        f"answered in {took[len(took) // 2]:.0f} ms (median) to {took[-1]:.0f} ms, "
        f"persisted {persisted_ms:.0f} ms after the last answer"
    )


def positive(value):
    if (number := int(value)) < 1:
        raise ValueError
    return number


if __name__ == "__main__":
    parser = arguments("Many shoppers rush for few items; exactly the stock is sold.")
    parser.add_argument("--users", type=positive, default=200, help="shoppers (%(default)s)")
    parser.add_argument("--stock", type=positive, default=100, help="items (%(default)s)")
    parser.add_argument(
        "--addresses",
        action="store_true",
        help="each shopper from an own 127.x.y.z (for more than the limit per address)",
    )
    run(test, parser)
