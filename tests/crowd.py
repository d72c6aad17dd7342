"""Many at the same moment."""

import threading
from concurrent.futures import ThreadPoolExecutor


def at_once(action, arguments):
    """Run the action for each argument in a thread of its own, all released together."""
    arguments = list(arguments)
    barrier = threading.Barrier(len(arguments))

    def run(argument):
        barrier.wait()
        return action(argument)

    with ThreadPoolExecutor(len(arguments)) as pool:
        return list(pool.map(run, arguments))
