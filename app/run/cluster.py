"""`make cluster`: the whole system on a Valkey Cluster of three primaries and three replicas, here.

It shows how a sale lives on several machines. Its nodes share one disk and its processors, so it is
slower than `make run`.
"""

import contextlib
import json
import os
import re
import secrets
import shlex
import shutil
import socket
import sys
import time
from itertools import cycle
from pathlib import Path

import redis

from app import telling
from app.config import Settings, load_settings
from app.run.embedded import POLL_SECONDS, RedisServer
from app.run.processes import StartError
from app.run.supervisor import SERVER_START_SECONDS, Supervisor, exit_code_of

PRIMARIES = 3
SLOTS = 16_384
FORMING_SECONDS = 60
NODE_OPTIONS = {
    "bind": "127.0.0.1",
    "cluster-enabled": "yes",
    # Of six nodes that share a disk, one may well be silent for a second.
    "cluster-node-timeout": "5000",
    # A dead node's timeout begins with a ping, which is else sent after half of it. Valkey's alone.
    "cluster-ping-interval": "100",
    # One node's death is not to stop the others.
    "cluster-require-full-coverage": "no",
    "repl-diskless-sync-delay": "0",
    # Else Valkey 9 looks only once a second whether a replica has all yet: nobody buys meanwhile.
    "repl-diskless-load": "swapdb",
    "repl-ping-replica-period": "1",
}
# What is so unless the environment says otherwise: two shards on each primary, and each order on
# its replica before it is answered.
DEFAULTS = {"SHARDS": "6", "REDIS_REPLICAS": "1"}


class Node(RedisServer):
    """One node, with its files in DATA_DIR/nodes/<port>."""

    options = NODE_OPTIONS

    def __init__(self, data_dir: Path, port: int, **more: str) -> None:
        """`more` are options, with underscores for hyphens."""
        options = {"port": str(port), **self.options}
        options |= {name.replace("_", "-"): value for name, value in more.items()}
        extra = tuple(f"{name}={value}" for name, value in options.items())
        super().__init__(data_dir / "nodes" / str(port), extra=extra)
        self.port = port

    def ask(self, *words: object) -> str:
        """Return its answer to a command, as text. Raises redis.RedisError."""
        with redis.Redis(port=self.port, decode_responses=True, socket_timeout=5) as client:
            # As the server sends it.
            client.response_callbacks.clear()
            return str(client.execute_command(*words))

    def await_answer(self, pattern: str, *words: object) -> None:
        """Wait until its answer to a command has this in it. Raises StartError."""
        deadline = time.monotonic() + FORMING_SECONDS
        while not re.search(pattern, self.ask(*words)):
            if time.monotonic() > deadline:
                raise StartError(f"the nodes were no cluster within {FORMING_SECONDS} s")
            time.sleep(POLL_SECONDS)


class Cluster:
    """The nodes of DATA_DIR, made when they are started for the first time."""

    def __init__(
        self,
        data_dir: Path,
        make: type[Node] = Node,
        primaries: int = PRIMARIES,
        replicas: int = 1,
        **options: str,
    ) -> None:
        """`replicas` are those of each primary, `options` of every node, with _ for hyphens."""
        self.primaries = primaries
        self.folder = data_dir / "nodes"
        # Written last: nodes without it were killed before they were a cluster.
        self._formed = self.folder / "formed"
        if self._formed.exists():
            ports = json.loads(self._formed.read_text())
        else:
            shutil.rmtree(self.folder, ignore_errors=True)
            ports = free_ports(primaries * (1 + replicas))
        self.nodes = [make(data_dir, port, **options) for port in ports]

    @property
    def url(self) -> str:
        return "redis+cluster://" + ",".join(f"127.0.0.1:{node.port}" for node in self.nodes)

    def form(self) -> None:
        """Make a cluster of the running nodes, and wait until it is well. Raises StartError."""
        nodes = self.nodes
        try:
            if not self._formed.exists():
                self._introduce()
                self._formed.write_text(json.dumps([node.port for node in nodes]))
            for node in nodes:
                node.await_answer("cluster_state:ok", "CLUSTER INFO")
                # A node may sell its own shards already, and be asked who has the others.
                node.await_answer(f"cluster_slots_assigned:{SLOTS}", "CLUSTER INFO")
                node.await_answer("role:master|master_link_status:up", "INFO REPLICATION")
        except redis.RedisError as error:
            raise StartError(f"the nodes don't make a cluster: {error}") from None

    def _introduce(self) -> None:
        nodes, primaries = self.nodes, self.nodes[: self.primaries]
        for number, node in enumerate(nodes):
            node.ask("CLUSTER SET-CONFIG-EPOCH", number + 1)
            if number < self.primaries:
                first, end = (SLOTS * edge // self.primaries for edge in (number, number + 1))
                node.ask("CLUSTER ADDSLOTSRANGE", first, end - 1)
        for node in nodes[1:]:
            nodes[0].ask("CLUSTER MEET", "127.0.0.1", node.port)
        for replica, primary in zip(nodes[self.primaries :], cycle(primaries), strict=False):
            identity = primary.ask("CLUSTER MYID")
            replica.await_answer(identity, "CLUSTER NODES")
            replica.ask("CLUSTER REPLICATE", identity)
            replica.await_answer("master_link_status:up", "INFO REPLICATION")


def free_ports(count: int) -> list[int]:
    """Return ports that nothing listens on, with room for the nodes' bus 10,000 above each.

    Below those that the kernel deals out by itself, and no port is another's bus.
    """
    ports: list[int] = []
    while len(ports) < count:
        # Two processes at once are not to draw the same, whatever seeds their `random`.
        port = 7000 + secrets.randbelow(10_000)
        if port in ports:
            continue
        with contextlib.suppress(OSError), socket.socket() as one, socket.socket() as bus:
            one.bind(("127.0.0.1", port))
            bus.bind(("127.0.0.1", port + 10_000))
            ports.append(port)
    return ports


class ClusterSupervisor(Supervisor):
    """Starts the nodes before everything else, and keeps them running, too."""

    def __init__(self, settings: Settings, cluster: Cluster, jobs: RedisServer) -> None:
        super().__init__(settings)
        self.cluster, self.jobs = cluster, jobs

    def start(self) -> None:
        """Start the nodes and the jobs' Redis, then all that `make run` starts."""
        ports = ", ".join(str(node.port) for node in self.cluster.nodes)
        telling.tell(f"Starting a cluster of nodes on the ports {ports}, and a Redis for jobs")
        for server in (*self.cluster.nodes, self.jobs):
            self._keep(server)
            server.start(SERVER_START_SECONDS, wait=self._pause)
        self.cluster.form()
        super().start()


def run() -> None:
    """Run all of it until told to stop. Raises SettingsError, StartError, EmbeddedError."""
    data_dir = load_settings().data_dir.resolve() / "cluster"
    cluster, jobs = Cluster(data_dir), RedisServer(data_dir / "jobs")
    environ = {name: os.environ.get(name, value) for name, value in DEFAULTS.items()}
    environ |= {
        "DATA_DIR": str(data_dir),
        "REDIS_URL": cluster.url,
        "JOBS_REDIS_URL": jobs.url,
    }
    # For the programs that are started.
    os.environ |= environ
    settings = load_settings()
    telling.configure(settings)
    note = data_dir / "environment"
    note.parent.mkdir(parents=True, exist_ok=True)
    note.write_text("".join(f"{name}={shlex.quote(value)}\n" for name, value in environ.items()))
    telling.tell(f"For commands beside it: set -a; . {note}; set +a")
    ClusterSupervisor(settings, cluster, jobs).run()


if __name__ == "__main__":
    sys.exit(exit_code_of(run))
