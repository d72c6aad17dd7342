"""One worker process: RQ's worker, the relay that calls for drains, the sampler and the sweeper.

Run as many as you like, on as many machines as you like. Who watches over one gives it a pipe to
say that it works, and what was wrong with the worker before it, if anything was.
"""

import contextlib
import logging
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

from app.loading import load_app

app = load_app()  # before all else: from here on what goes wrong is a log line

# isort: split
import redis
import rq
from rq import SimpleWorker
from rq.exceptions import StopRequested
from rq.serializers import JSONSerializer
from rq.worker import WorkerStatus

from app.extensions import stock
from app.problems import Unavailable
from app.run.collector import spare_what_is_loaded
from app.watch.telemetry import Meter
from app.worker.alive import Heartbeat
from app.worker.jobs import orders_queue
from app.worker.relay import (
    Canceller,
    Expirer,
    Numberer,
    Relay,
    Sampler,
    Sweeper,
    run_forever,
)

log = logging.getLogger(__name__)

# RQ waits 15 s less than this for a job, and 10 s more for an answer of a dead connection.
WORKER_TTL_SECONDS = 20
NEXT_WORKER_SECONDS = 1.0
# One ends the next holds while the units of the other's go to Redis.
EXPIRERS = 2


class Worker(SimpleWorker):
    """RQ's worker, which knows whether it was asked to end, and tells when it gets on."""

    asked = False
    turned: Callable[[], None] = staticmethod(lambda: None)

    def heartbeat(self, *arguments: Any, **options: Any) -> None:
        self.turned()
        if self.asked and self.get_state() != WorkerStatus.BUSY:
            # What the signal's handler raised was kept by whom it interrupted: by logging, where
            # Redis is gone at the same moment.
            raise StopRequested
        super().heartbeat(*arguments, **options)

    def request_stop(self, signum: int, frame: FrameType | None) -> None:
        self.asked = True
        super().request_stop(signum, frame)  # type: ignore[no-untyped-call]  # RQ's has no types


def new_name() -> str:
    """Return a name of its own: RQ refuses a killed worker's, and in containers pids recur."""
    return f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(2)}"


def work(queue: rq.Queue, turned: Callable[[], None]) -> None:
    """Run one RQ worker of a queue after the other until a signal comes.

    RQ's worker ends when it stumbles over what it finds in Redis. The process stays: the relay in
    it has to live for some seconds to see that nobody stores the orders, and to do so itself.
    """
    while True:
        turned()
        worker, reason = None, "it gave up"
        try:
            # No fork per job (19 ms). One queue: a worker of several can lose a job when killed.
            worker = Worker(
                [queue],
                name=new_name(),
                connection=queue.connection,
                serializer=JSONSerializer,
                worker_ttl=WORKER_TTL_SECONDS,
            )
            worker.turned = turned
            worker.max_connection_wait_time = 1.0
            worker.work(logging_level=None)
        except StopRequested:
            return
        except Exception as error:
            reason = str(error).partition("\n")[0]
        if worker and worker.asked:
            # Whatever it has stumbled over since: it takes leave of a Redis that may be gone, too.
            return
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: sys.exit())
        log.warning("RQ's worker ended: %s; the next one in %g s", reason, NEXT_WORKER_SECONDS)
        time.sleep(NEXT_WORKER_SECONDS)


def main(pipe: str | None = None, replaces: str = "") -> None:
    """Work until a signal comes. `pipe` and `replaces`: see app/run/processes.py, `Watched`."""
    name = new_name()
    steps = (
        Relay().run_once,
        Numberer().run_once,
        Sampler(name).run_once,
        Sweeper().run_once,
        Canceller().run_once,
        *(Expirer().run_once for _ in range(EXPIRERS)),
    )
    try:
        run("worker", orders_queue, steps, pipe, replaces)
    finally:
        with app.app_context(), contextlib.suppress(Unavailable):
            stock.board.gone(name)


def run(
    role: str,
    queue: Callable[[redis.Redis], rq.Queue],
    steps: Sequence[Callable[..., None]],
    pipe: str | None = None,
    replaces: str = "",
) -> None:
    """Work on a queue, with the steps beside it each in a thread, until a signal comes."""
    spare_what_is_loaded()
    meter = Meter(role)
    if replaces:
        meter.count(f"worker-restart:{replaces}")
    meter.start()
    stopped = threading.Event()
    heartbeat = Heartbeat(int(pipe) if pipe else os.open(os.devnull, os.O_WRONLY))
    threads = [
        threading.Thread(
            target=run_forever,
            args=(app, step, stopped, heartbeat.thread(step.__qualname__)),
            name=step.__qualname__,
            daemon=True,
        )
        for step in steps
    ]
    turned = heartbeat.thread("RQ")
    for thread in threads:
        thread.start()
    heartbeat.start()
    # RQ blocks on its queue for seconds, and raises this client's timeout for it: one of its own.
    connection = stock.jobs_server.client(decode=False, cautious=False, socket_timeout=None)
    with app.app_context():
        try:
            work(queue(connection), turned)
        finally:
            stopped.set()
            for thread in threads:
                thread.join(timeout=5)


if __name__ == "__main__":
    main(*sys.argv[1:])
