"""One process that sends webhooks: RQ's worker of their queue, and who calls for deliveries.

Apart from worker.py, so that somebody else's slow server never keeps an order waiting.
"""

from worker import run  # before all else: from here on what goes wrong is a log line

# isort: split
from app.worker.caller import Caller
from app.worker.jobs import webhooks_queue

if __name__ == "__main__":
    run("webhooks", webhooks_queue, (Caller().run_once,))
