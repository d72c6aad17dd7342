"""Many at the same moment."""

import threading
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import patch

from waiting import patience

from app import database


def at_once(action, arguments):
    """Run the action for each argument in a thread of its own, all released together.

    They wait for each other's rows; what a request waits for PostgreSQL is that of an idle machine.
    """
    arguments = list(arguments)
    barrier = threading.Barrier(len(arguments))

    def run(argument):
        barrier.wait()
        return action(argument)

    seconds = patience(database.REQUEST_WAIT_SECONDS)
    with (
        patch.object(database, "REQUEST_WAIT_SECONDS", seconds),
        ThreadPoolExecutor(len(arguments)) as pool,
    ):
        return list(pool.map(run, arguments))
