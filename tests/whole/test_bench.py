"""The benchmark runs to its end: what changes around it does not break it unseen."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from client import free_port

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.drill,
    pytest.mark.skipif(not shutil.which("wrk"), reason="wrk is not installed"),
]


def measured(*command: str) -> str:
    run = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, f"{run.stdout}\n{run.stderr}"
    return run.stdout


def test_a_small_run_has_every_table():
    told = measured("stress/bench.py", "--quick", "--no-peer", "--port", str(free_port()))
    for row in (
        "accepted purchases/s",
        "1,000 connections, p99 ms",
        "one poll of a dashboard meanwhile, median ms",
        "drain of a backlog of ",
        "order search on the support page, ms",
        "all web processes killed",
    ):
        assert f"| {row}" in told, row
    assert told.count("| appendfsync ") == 2


def test_shards_and_pulls_are_measured():
    told = measured("stress/bench_shards.py", "--rounds", "1", "--claims", "320", "--pulls", "3")
    assert told.count("6 shards, ") == 4
    assert told.count("a pull is ") == 2
