"""Buy, and know whether it worked: buy.py URL USER PRODUCT [QUANTITY]

Prints the order id (exit 0), the reason of a refusal (1), or how to go on (3).
Environment: PATIENCE, seconds to go on trying (90); KEY, to go on with an earlier purchase.
"""
# ruff: noqa: S310 - the URL is the caller's own

import http.client
import json
import os
import random
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid

ANSWER_SECONDS = 5  # no answer by then: nobody knows the outcome
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 1, 8


def post(url, body, key):
    """Make one attempt; return status, body and Retry-After, with status 0 for no answer."""
    headers = {"Content-Type": "application/json", "Idempotency-Key": key}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    try:
        try:
            response = urllib.request.urlopen(request, timeout=ANSWER_SECONDS)
        except urllib.error.HTTPError as error:
            response = error  # an answer like any other
        with response:
            return response.status, json.load(response), response.headers.get("Retry-After", "")
    except (OSError, http.client.HTTPException, ValueError):
        return 0, {}, ""


def buy(url, purchase, key, patience):
    """Attempt until the answer is final; return its status and body, or None if none came."""
    deadline = time.monotonic() + patience
    longest = FIRST_WAIT_SECONDS
    while True:
        status, body, retry_after = post(f"{url}/purchase", purchase, key)
        if 200 <= status < 500 and status != 429:
            return status, body
        # A random part keeps a crowd that failed together from coming back together.
        wait = random.uniform(0, longest) + (int(retry_after) if retry_after.isdigit() else 0)
        longest = min(2 * longest, LONGEST_WAIT_SECONDS)
        if time.monotonic() + wait > deadline:
            return None
        time.sleep(wait)


def main():
    if len(sys.argv) not in (4, 5) or not all(number.isdigit() for number in sys.argv[3:]):
        print(__doc__, file=sys.stderr)
        return 2
    url, user, product, quantity = [*sys.argv[1:], "1"][:4]
    purchase = {"userId": user, "productId": int(product), "quantity": int(quantity)}
    key = os.environ.get("KEY") or str(uuid.uuid4())  # one per intent, the same in every attempt
    answer = buy(url, purchase, key, float(os.environ.get("PATIENCE") or 90))
    if answer is None:
        orders = f"{url}/purchase/orders/{urllib.parse.quote(user, safe='')}"
        print(f"undecided: go on with KEY={key}, or see {orders}")
        return 3
    status, body = answer
    print(body["orderId"] if status == 200 else f"refused: {body.get('code', status)}")
    return 0 if status == 200 else 1


if __name__ == "__main__":
    sys.exit(main())
