"""Calls for deliveries of webhooks: a turn for each endpoint that something is to be sent to."""

import threading
import time

from ..feed import delivery, numbering
from . import jobs

PACE_SECONDS = 0.2
FORGET_SECONDS = 60.0


class Caller:
    """Looks a few times a second. Any number of them may run; they do no harm together."""

    def __init__(self) -> None:
        self._forgot_at = float("-inf")

    def run_once(self, stopped: threading.Event) -> None:
        """Raises stock.Unavailable and SQLAlchemyError."""
        for endpoint_id, failing in delivery.due():
            jobs.enqueue_webhook(endpoint_id, failing)
        # As long as the events themselves are kept, some at a time.
        if (
            time.monotonic() - self._forgot_at > FORGET_SECONDS
            and delivery.forget_old(numbering.KEPT_DAYS) < delivery.FORGOTTEN_AT_ONCE
        ):
            self._forgot_at = time.monotonic()
        stopped.wait(PACE_SECONDS)
