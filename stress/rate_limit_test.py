"""Anti-bot: of ten requests of one user five pass, and five are told when to come back."""

import re

from client import arguments, counted, fresh_user, run, rush

REQUESTS, LIMIT, WINDOW_SECONDS = 10, 5, 60
STOCK = 2 * REQUESTS
REFUSAL = {"error": "Too many requests", "code": "rate_limited", "limit": "user"}


def test(server, options, promises):
    spammer = fresh_user()
    with server.product("Stress test: rate limit", STOCK) as product:
        purchase = {"userId": spammer, "productId": product, "quantity": 1}
        answers = [server.buy(purchase) for _ in range(REQUESTS)]
        refused = answers[LIMIT:]
        print(f"{REQUESTS} requests of one user, then {REQUESTS} at once of another:")

        expected = [200] * LIMIT + [429] * (REQUESTS - LIMIT)
        promises.check("in turn", joined(expected), joined(a.status for a in answers))
        bodies = sum(answer.body == REFUSAL for answer in refused)
        promises.check("documented refusals", len(refused), bodies)
        waits = [int(answer.headers.get("retry-after", 0)) for answer in refused]
        in_range = sum(1 <= wait <= WINDOW_SECONDS for wait in waits)
        promises.check("Retry-After from 1 to 60 s", len(refused), in_range)

        policies = {answer.headers.get("ratelimit-policy", "missing") for answer in answers}
        policy = f'"user";q={LIMIT};w={WINDOW_SECONDS}'
        promises.check("RateLimit-Policy", policy, " / ".join(policies))
        left = [remaining(answer) for answer in answers]
        promises.check("RateLimit: r=", joined([4, 3, 2, 1] + [0] * 6), joined(left))

        promises.check("stock taken", LIMIT, STOCK - server.stock(product))
        crowd = rush(server, [purchase | {"userId": spammer + 1}] * REQUESTS)
        promises.check("at once", "5 × 200 queued, 5 × 429 rate_limited", counted(crowd))
        promises.check("stock taken by both", 2 * LIMIT, STOCK - server.stock(product))


def joined(values):
    return " ".join(map(str, values))


def remaining(answer):
    """Return `r` of the RateLimit header, or "?" when it is not as documented."""
    header = re.fullmatch(r'"user";r=(\d+);t=(\d+)', answer.headers.get("ratelimit", ""))
    return header[1] if header and int(header[2]) <= WINDOW_SECONDS else "?"


if __name__ == "__main__":
    run(test, arguments("Ten requests of one user: five pass, five get 429."))
