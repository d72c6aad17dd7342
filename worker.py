"""One worker process: RQ's worker, the relay that calls for drains, and the sweeper.

Run as many as you like, on as many machines as you like.
"""

import contextlib
import os
import secrets
import socket
import threading

import redis
from rq import SimpleWorker
from rq.serializers import JSONSerializer

from app.jobs import orders_queue
from app.relay import Relay, Sweeper, run_forever
from app.stock import Keys
from app.telemetry import Meter
from wsgi import app

# RQ waits 15 s less than this for a job, and 10 s more for an answer of a dead connection.
WORKER_TTL_SECONDS = 20


def main() -> None:
    # RQ refuses a name that a killed worker had minutes ago, and in containers pids recur.
    name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(2)}"
    Meter("worker").start()
    stopped = threading.Event()
    threads = [
        threading.Thread(target=run_forever, args=(app, step, stopped), name=step.__qualname__)
        for step in (Relay().run_once, Sweeper(name).run_once)
    ]
    for thread in threads:
        thread.daemon = True
        thread.start()
    # RQ blocks on its queue for seconds, and raises this client's timeout for it: one of its own.
    connection = redis.Redis.from_url(app.config["SETTINGS"].redis_url, socket_connect_timeout=1)
    with app.app_context():
        # No fork per job (19 ms), and one queue: a worker of several can lose a job when killed.
        worker = SimpleWorker(
            [orders_queue(connection)],
            name=name,
            connection=connection,
            serializer=JSONSerializer,
            worker_ttl=WORKER_TTL_SECONDS,
        )
        worker.max_connection_wait_time = 1.0
        try:
            worker.work(logging_level=None)
        finally:
            stopped.set()
            for thread in threads:
                thread.join(timeout=5)
            with contextlib.suppress(redis.RedisError):
                connection.zrem(Keys.workers, name)


if __name__ == "__main__":
    main()
