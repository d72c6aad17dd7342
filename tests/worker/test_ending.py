"""A worker that is asked to end does so at once, whatever has become of its Redis."""

import os
import sys

import redis
from system import end, spawn
from waiting import patience, wait_until

from app.run.embedded import RedisServer


def waits(client: redis.Redis) -> bool:
    return any(client.hget(name, "state") == b"idle" for name in client.smembers("rq:workers"))


def test_redis_is_gone_when_it_is_asked(app, settings, tmp_path):
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
        worker = spawn([sys.executable, "worker.py"], env=environ, stdout=log, stderr=log)
    try:
        with redis.Redis.from_url(server.url) as client:
            wait_until(lambda: waits(client), 30, "RQ's worker to wait for jobs")
        server.kill()
        worker.terminate()
        assert worker.wait(patience(20)) == 0
    finally:
        end(worker, tmp_path)
        server.stop()
