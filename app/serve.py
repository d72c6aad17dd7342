"""The web server by itself: `python -m app.serve`, as containers and systemd run it.

The supervisor starts the same command beside everything else. SIGHUP renews its processes one after
the other, SIGTERM lets requests in flight finish.
"""

import os
import resource
import socket
import sys

from app.config import Settings, SettingsError, load_settings, with_secrets
from app.embedded import EmbeddedError, embedded_servers

# What a request in flight may still take when its process is to end.
STOP_SECONDS = 5
# A client has so long for the headers of its next request, counted from the last one's end: slow
# senders and idle connections go. A proxy's own idle limit has to be shorter.
HEADERS_WITHIN_MS = 30_000
# One descriptor per open connection; the usual 1024 is too few, and all there are slows forks.
OPEN_FILES = 65536


def command(settings: Settings, address: str) -> list[str]:
    """Return the command line that serves on an IP address and PORT."""
    options = {
        "interface": "asginl",
        "loop": "uvloop",
        "host": address,
        "port": settings.port,
        "workers": settings.web_workers,
        "backlog": 4096,
        # Counts open connections, the idle ones too: past it nobody else is let in.
        "backpressure": 4096,
        "http1-header-read-timeout": HEADERS_WITHIN_MS,
        "workers-kill-timeout": STOP_SECONDS,
        "log-level": "warning",
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    flags = ["--no-ws", "--no-access-log", "--respawn-failed-workers"]
    return [sys.executable, "-m", "granian", *words, *flags, "asgi:app"]


def allow_open_files() -> None:
    """Raise this process's limit on open files as far as it may and needs."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, enough), hard))


def main() -> None:
    """Become the web server; the servers behind it must be given."""
    try:
        settings = with_secrets(load_settings())
        if embedded_servers(settings):
            raise SettingsError("REDIS_URL and DATABASE_URL are needed; `make run` brings its own")
        address = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0][4]
    except (SettingsError, EmbeddedError, OSError) as error:
        sys.exit(f"error: {error}")
    allow_open_files()
    argv = command(settings, address[0])
    os.execv(argv[0], argv)  # noqa: S606


if __name__ == "__main__":
    main()
