"""One worker process: RQ's worker, the relay that calls for drains, and the sweeper.

Run as many as you like, on as many machines as you like.
"""

import os
import socket
import threading

from rq import SimpleWorker
from rq.serializers import JSONSerializer

from app.jobs import orders_queue
from app.relay import Relay, Sweeper, run_forever
from app.stock import Keys
from app.telemetry import Meter
from wsgi import app


def main() -> None:
    name = f"{socket.gethostname()}-{os.getpid()}"
    Meter("worker").start()
    stopped = threading.Event()
    threads = [
        threading.Thread(target=run_forever, args=(app, step, stopped), name=step.__qualname__)
        for step in (Relay().run_once, Sweeper(name).run_once)
    ]
    for thread in threads:
        thread.daemon = True
        thread.start()
    with app.app_context():
        queue = orders_queue()
        # No fork per job (19 ms), and one queue: a worker of several can lose a job when killed.
        worker = SimpleWorker(
            [queue], name=name, connection=queue.connection, serializer=JSONSerializer
        )
        worker.max_connection_wait_time = 1.0
        try:
            worker.work(logging_level=None)
        finally:
            stopped.set()
            for thread in threads:
                thread.join(timeout=5)
            queue.connection.zrem(Keys.workers, name)


if __name__ == "__main__":
    main()
