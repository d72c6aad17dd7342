"""A checkout with Stripe: hold, authorise, confirm the hold, capture; a lost hold moves no money.

Whatever is killed, doubled, reordered or late, an intent is settled by what it and the order are
now: `settle` may be called any number of times, by the checkout and by webhooks.
"""
# ruff: noqa: S310 - the URL is the caller's own

import json
import urllib.error
import urllib.request

import stripe

ANSWER_SECONDS = 5
# Stripe gave no answer, or none that says what has become of it.
NO_ANSWER = (stripe.APIConnectionError, stripe.APIError, stripe.RateLimitError)


class TryAgain(Exception):
    """Nobody knows yet: settle the intent again, later. Stripe repeats webhooks by itself."""


class Checkout:
    """Pays for orders that the sale holds; `token` is an API token with the scope orders:write."""

    def __init__(self, sale_url, token, client, webhook_secret):
        self.sale_url, self.token = sale_url, token
        self.intents = client.v1.payment_intents  # of a stripe.StripeClient
        self.webhook_secret = webhook_secret

    def pay(self, held, quantity, payment_method):
        """Pay for what POST /purchase answered; return "paid", "declined" or "lost".

        Raises TryAgain; then the same call again does nothing twice.
        """
        order = held["orderId"]
        params = {
            "amount": held["unitPriceCents"] * quantity,
            "currency": held["currency"].lower(),
            "payment_method": payment_method,
            "payment_method_types": ["card"],
            "capture_method": "manual",  # authorised now, and taken when the unit is surely ours
            "confirm": True,
            "metadata": {"order": str(order)},
        }
        try:
            options = {"idempotency_key": f"order-{order}-{payment_method}"}
            intent = self.intents.create(params, options)
        except stripe.CardError:
            return "declined"  # the shopper may try another card; the hold ends by itself
        except NO_ANSWER as error:
            raise TryAgain from error
        return self.settle(intent)

    def settle(self, intent):
        """Bring an intent to its end; return "paid", "lost", or its status while it has to wait."""
        if intent.status == "succeeded":
            return "paid"
        if intent.status == "canceled":
            return "lost"
        if intent.status != "requires_capture":
            return intent.status
        order = intent.metadata["order"]
        status, answer = self.act(order, "confirm", {"payment": intent.id}, intent.id)
        confirmed = status in (200, 202)
        try:
            if confirmed:
                self.intents.capture(intent.id)
                return "paid"
            if status in (404, 409):
                # Too late, and the units are gone; or the order was paid for otherwise.
                self.intents.cancel(intent.id)
                return "lost"
        except stripe.InvalidRequestError as error:
            # Somebody else was faster: what it is now counts.
            now = self.retrieve(intent.id)
            if now.status == "canceled" and confirmed:
                # The authorisation is gone, so the unit is not paid for: it goes back.
                reason = {"reason": "the payment was cancelled"}
                status, answer = self.act(order, "cancel", reason, intent.id)
                if status != 200 and answer.get("code") != "already_cancelled":
                    raise TryAgain(f"{status} {answer}") from error
            if now.status in ("succeeded", "canceled"):
                return self.settle(now)
            raise TryAgain from error
        except NO_ANSWER as error:
            raise TryAgain from error
        raise TryAgain(f"{status} {answer}")

    def retrieve(self, name):
        try:
            return self.intents.retrieve(name)
        except NO_ANSWER as error:
            raise TryAgain from error

    def act(self, order, act, body, key):
        """Confirm or cancel an order, once; return status and body, status 0 for no answer."""
        request = urllib.request.Request(
            f"{self.sale_url}/orders/{order}/{act}",
            json.dumps(body).encode(),
            {
                "Content-Type": "application/json",
                "Authorization": f"Bearer {self.token}",
                "Idempotency-Key": key,
            },
        )
        try:
            try:
                response = urllib.request.urlopen(request, timeout=ANSWER_SECONDS)
            except urllib.error.HTTPError as error:
                response = error
            with response:
                return response.status, json.load(response)
        except (OSError, ValueError):
            return 0, {}

    def webhook(self, body, signature):
        """Take a webhook of Stripe; answer 2xx if it returns, 400 if it raises ValueError.

        Raises TryAgain: answer 503, and Stripe sends it again.
        """
        try:
            event = stripe.Webhook.construct_event(body, signature, self.webhook_secret)
        except stripe.SignatureVerificationError as error:
            raise ValueError("not signed by Stripe") from error
        if event.type.startswith("payment_intent."):
            # Events come twice, late and in any order: the intent as it is now is what counts.
            intent = self.retrieve(event.data.object.id)
            # Stripe tells of all payments of the shop's account.
            if "order" in (intent.metadata or {}):
                self.settle(intent)
