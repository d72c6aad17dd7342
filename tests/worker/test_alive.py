"""What a worker tells those who watch over it: whoever started it, and systemd."""

import os
import socket

import pytest

from app.run.pulse import ALIVE, STUCK
from app.worker.alive import Heartbeat


@pytest.fixture
def pipe():
    ours, theirs = os.pipe()
    yield ours, theirs
    os.close(ours)
    os.close(theirs)


@pytest.mark.parametrize("abstract", [False, True], ids=["a file", "abstract"])
def test_systemd_hears_of_it_as_long_as_all_threads_get_on(pipe, tmp_path, monkeypatch, abstract):
    ours, theirs = pipe
    name = f"@flash-sale-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(name.replace("@", "\0"))
        systemd.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        heart = Heartbeat(theirs)
        heart._write(ALIVE)
        assert systemd.recv(100) == b"WATCHDOG=1"
        heart._write(STUCK)
        with pytest.raises(BlockingIOError):
            systemd.recv(100)
    # Nobody listens any more: that is not the worker's trouble.
    heart._write(ALIVE)
    assert os.read(ours, 100) == ALIVE + STUCK + ALIVE


def test_without_systemd_the_pipe_alone_is_told(pipe, monkeypatch):
    ours, theirs = pipe
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    Heartbeat(theirs)._write(ALIVE)
    assert os.read(ours, 100) == ALIVE
