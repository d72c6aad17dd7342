"""One process that sends webhooks: RQ's worker of their queue, and who calls for deliveries.

Apart from worker.py, so that somebody else's slow server never keeps an order waiting.
"""

import sys

from worker import run  # before all else: from here on what goes wrong is a log line

# isort: split
from app.worker.caller import Caller
from app.worker.jobs import webhooks_queue


def main(pipe: str | None = None, replaces: str = "") -> None:
    """Send until a signal comes. `pipe` and `replaces`: see app/run/processes.py, `Watched`."""
    run("webhooks", webhooks_queue, (Caller().run_once,), pipe, replaces)


if __name__ == "__main__":
    main(*sys.argv[1:])
