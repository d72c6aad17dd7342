"""The private servers keep their data whatever is killed, and say clearly what they can't do."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import psycopg2
import pytest
import redis
from waiting import wait_until

from app.config import ROOT, Settings
from app.run import embedded
from app.run.embedded import EmbeddedError, PostgresServer, RedisServer, servers

# Tests kill processes, not machines: what is in the page cache is safe enough here.
QUICK = ["fsync=off"]

STARTER = """
import sys
from app.run.embedded import {name}
server = {name}(sys.argv[1])
server.start()
print("own" if server.process else "found", flush=True)
sys.stdin.read()
server.stop()
"""


@pytest.fixture
def redis_server(tmp_path):
    server = RedisServer(tmp_path)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def postgres(tmp_path):
    server = PostgresServer(tmp_path, extra=QUICK)
    server.start()
    yield server
    server.stop()


def sql(server, statement):
    connection = psycopg2.connect(server.url.replace("+psycopg2", ""))
    try:
        with connection, connection.cursor() as cursor:
            cursor.execute(statement)
            return cursor.fetchone()[0] if cursor.description else None
    finally:
        connection.close()


def starter(name, data_dir):
    return subprocess.Popen(
        [sys.executable, "-c", STARTER.format(name=name), data_dir],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_redis_keeps_its_data(redis_server, end):
    redis.from_url(redis_server.url).set("stock", 7)
    getattr(redis_server, end)()
    assert not redis_server.is_running()
    redis_server.start()
    assert redis.from_url(redis_server.url).get("stock") == b"7"


def test_redis_is_set_up_for_orders(redis_server):
    client = redis.from_url(redis_server.url)
    wanted = {"appendonly": "yes", "appendfsync": "always", "maxmemory-policy": "noeviction"}
    assert client.config_get(*wanted) == wanted
    assert redis_server.socket.stat().st_mode & 0o077 == 0


def test_redis_starts_with_a_torn_tail(redis_server):
    redis.from_url(redis_server.url).set("stock", 7)
    redis_server.kill()
    (log,) = redis_server.directory.glob("appendonlydir/*.incr.aof")
    with log.open("ab") as file:
        file.write(b"*3\r\n$3\r\nSET\r\n$5\r\nsto")
    redis_server.start()
    assert redis.from_url(redis_server.url).get("stock") == b"7"


@pytest.mark.drill
@pytest.mark.parametrize("end", ["stop", "kill"])
def test_postgres_keeps_its_data(postgres, end):
    sql(postgres, "CREATE TABLE kept AS SELECT 7 AS units")
    getattr(postgres, end)()
    wait_until(lambda: not postgres.is_running())
    postgres.start()
    assert sql(postgres, "SELECT units FROM kept") == 7
    assert sql(postgres, "SHOW data_checksums") == "on"
    assert sql(postgres, "SHOW synchronous_commit") == "on"
    assert sql(postgres, "SHOW listen_addresses") == ""
    assert sql(postgres, "SHOW timezone") == "UTC"


@pytest.mark.drill
@pytest.mark.parametrize("content", ["empty", "a number that another process has now"])
def test_postgres_starts_with_a_stale_pid_file(postgres, content):
    postgres.kill()
    with subprocess.Popen(["sleep", "60"]) as other:
        for path in (postgres.directory / "data/postmaster.pid", Path(f"{postgres.socket}.lock")):
            path.write_text(
                ""
                if content == "empty"
                else path.read_text().replace(path.read_text().split("\n")[0], str(other.pid), 1)
            )
        postgres.start()
        other.kill()
    assert sql(postgres, "SELECT 1") == 1


def test_a_half_made_cluster_is_made_anew(tmp_path):
    (tmp_path / "postgres/draft-killed/base").mkdir(parents=True)
    server = PostgresServer(tmp_path, extra=QUICK)
    server.start()
    server.stop()
    assert not list(tmp_path.glob("postgres/draft-*"))


@pytest.mark.parametrize("name", ["RedisServer", "PostgresServer"])
def test_of_two_starters_the_second_finds_the_firsts_server(tmp_path, name):
    with starter(name, tmp_path) as first, starter(name, tmp_path) as second:
        assert sorted(each.stdout.readline() for each in (first, second)) == ["found\n", "own\n"]
        for each in (first, second):
            each.stdin.close()
    assert (first.returncode, second.returncode) == (0, 0)


@pytest.mark.drill
@pytest.mark.parametrize("name", ["RedisServer", "PostgresServer"])
def test_a_server_ends_with_its_starter_and_can_be_started_at_once(tmp_path, name):
    with starter(name, tmp_path) as first:
        assert first.stdout.readline() == "own\n"
        first.kill()
    server = getattr(embedded, name)(tmp_path)
    server.start()
    assert server.process is not None
    server.stop()


@pytest.mark.parametrize("kind", [RedisServer, PostgresServer])
def test_a_path_too_long_for_a_socket(tmp_path, kind):
    server = kind(tmp_path / ("long-" * 20) / ("path-" * 20))
    try:
        server.start()
        assert server.sockets.stat().st_mode & 0o777 == 0o700
    finally:
        server.stop()
        for file in server.sockets.iterdir():
            file.unlink()
        server.sockets.rmdir()


def test_a_socket_directory_open_to_others_is_refused(tmp_path):
    server = RedisServer(tmp_path / ("long-" * 20) / ("path-" * 20))
    server.sockets.mkdir()
    server.sockets.chmod(0o777)
    try:
        with pytest.raises(EmbeddedError, match="use a shorter DATA_DIR"):
            server.start()
    finally:
        server.sockets.rmdir()


def test_a_data_dir_that_is_none(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EmbeddedError, match=r"Redis can't use .*Not a directory; DATA_DIR must"):
        RedisServer(tmp_path / "file").start()


def test_a_platform_without_binaries(tmp_path, monkeypatch):
    monkeypatch.setattr(embedded, "find_spec", lambda package: None)
    with pytest.raises(EmbeddedError, match="set REDIS_URL and DATABASE_URL"):
        PostgresServer(tmp_path).start()


def test_the_reason_of_a_failed_start_is_told(tmp_path):
    with pytest.raises(EmbeddedError, match=r"Redis did not start: .*memory value.*redis\.log"):
        RedisServer(tmp_path, extra=["maxmemory=much"]).start()


def test_a_start_that_takes_too_long_leaves_nothing(tmp_path):
    server = RedisServer(tmp_path)
    with pytest.raises(EmbeddedError, match="did not answer within 0 s"):
        server.start(timeout_seconds=0)
    assert server.process is None
    assert not server.is_running()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has to become somebody else")
def test_root_without_user_namespaces(tmp_path, monkeypatch):
    works = PostgresServer._works
    monkeypatch.setattr(
        PostgresServer,
        "_works",
        lambda self, who, where: who == "nobody" and works(self, who, where),
    )
    with pytest.raises(EmbeddedError, match="run as an ordinary user"):
        PostgresServer(tmp_path).start()  # pytest's directories are closed to others
    with tempfile.TemporaryDirectory() as reachable:
        os.chmod(reachable, 0o755)
        server = PostgresServer(reachable, extra=QUICK)
        try:
            server.start()
        except EmbeddedError:
            pytest.skip("the packages are in a place closed to others")
        assert (server.directory / "data").stat().st_uid == embedded.NOBODY
        server.stop()
        monkeypatch.undo()
        server.start()
        assert (server.directory / "data").stat().st_uid == 0
        server.stop()


def test_servers_are_found_or_started_for_the_duration(tmp_path):
    with servers(Settings(data_dir=tmp_path)) as outer:
        assert redis.from_url(outer.redis_url).ping()
        with servers(Settings(data_dir=tmp_path)) as inner:
            assert inner == outer
        assert redis.from_url(outer.redis_url).ping()
    assert not RedisServer(tmp_path).is_running()
    assert not PostgresServer(tmp_path).is_running()


def test_given_urls_are_kept(tmp_path):
    given = Settings(data_dir=tmp_path, redis_url="redis://r", database_url="postgresql://d")
    with servers(given) as settings:
        assert settings == given
    assert list(tmp_path.iterdir()) == []


def test_production_has_servers_of_its_own(tmp_path):
    lacking = Settings(data_dir=tmp_path, app_env="production", redis_url="redis://r")
    with pytest.raises(EmbeddedError, match="needs REDIS_URL"), servers(lacking):
        pass


def test_the_terminals_ctrl_c_does_not_reach_a_server(redis_server):
    assert os.getpgid(redis_server.process.pid) != os.getpgid(0)
    assert redis_server.stop_signal != signal.SIGKILL
