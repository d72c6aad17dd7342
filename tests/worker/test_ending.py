"""A worker that is asked to end does so at once, whatever has become of its Redis."""

import os
import sys

import pytest
import redis
from system import end, spawn
from waiting import patience, wait_until

from app.run.embedded import RedisServer


def waits(client: redis.Redis) -> bool:
    return any(client.hget(name, "state") == b"idle" for name in client.smembers("rq:workers"))


# It is asked while it writes the line that Redis is gone. Logging keeps to itself what is raised in
# its handlers, and so what RQ's signal handler raises then.
ASKED_IN_A_LOG_LINE = """
import logging, os, signal, threading, worker

class Handler(logging.Handler):
    asked = False

    def emit(self, record):
        if self.asked or threading.current_thread() is not threading.main_thread():
            return
        if "could not connect" in record.getMessage():
            self.asked = True
            try:
                os.kill(os.getpid(), signal.SIGTERM)
            except Exception:
                self.handleError(record)

logging.getLogger("rq.worker").addHandler(Handler())
worker.main()
"""


@pytest.mark.parametrize("program", [["worker.py"], ["-c", ASKED_IN_A_LOG_LINE]], ids=["", "log"])
def test_redis_is_gone_when_it_is_asked(app, settings, tmp_path, program):
    """As when a run is killed: both are told at the same moment."""
    server = RedisServer(tmp_path)
    server.start()
    environ = os.environ | {
        "REDIS_URL": server.url,
        "DATABASE_URL": settings.database_url,
        "SECRET_KEY": settings.secret_key,
        "DATA_DIR": str(tmp_path),
    }
    with (tmp_path / "log").open("w") as log:
        worker = spawn([sys.executable, *program], env=environ, stdout=log, stderr=log)
    try:
        with redis.Redis.from_url(server.url) as client:
            wait_until(lambda: waits(client), 30, "RQ's worker to wait for jobs")
        server.kill()
        if program == ["worker.py"]:
            worker.terminate()
        assert worker.wait(patience(20)) == 0
    finally:
        end(worker, tmp_path)
        server.stop()
