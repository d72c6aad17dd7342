"""The ordinary road to a shard: its keys, its clients, its scripts."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib import resources
from typing import Any, Generic, TypeVar

import redis

from ..problems import Unavailable
from .keys import Keys
from .replicas import Replicas, Unreplicated
from .servers import Server
from .shards import Part

Answer = TypeVar("Answer")
Command = tuple[Any, ...]


@dataclass(frozen=True)
class Question(Generic[Answer]):
    """Commands that may be sent again, and together with others', and what their answers mean.

    `read` may raise Unavailable. `script` is the one that the commands run, if they do.
    """

    commands: Sequence[Command]
    read: Callable[[list[Any]], Answer]
    script: str | None = None


@cache
def scripts() -> dict[str, str]:
    """Return the text of every script, by its name."""
    return {
        path.name.removesuffix(".lua"): path.read_text()
        for path in resources.files("app.stock.lua").iterdir()
        if path.name.endswith(".lua")
    }


@contextlib.contextmanager
def asking() -> Iterator[None]:
    """Raise Unavailable where Redis gives no answer, or refuses."""
    try:
        yield
    except redis.RedisError as error:
        raise Unavailable(str(error)) from error


def piped(client: Any, commands: Sequence[Command], **how: bool) -> list[Any]:
    """Return the answers to commands that are sent in one go. Raises redis.RedisError."""
    if len(commands) == 1 and not how:
        return [client.execute_command(*commands[0])]
    with client.pipeline(transaction=False) as pipe:
        for words in commands:
            pipe.execute_command(*words)
        return list(pipe.execute(**how))


class Link:
    """To one shard; safe to use from several threads. Nothing connects before the first use."""

    def __init__(self, part: Part, server: Server, replicas: int) -> None:
        self.part = part
        self.server = server
        self.keys = Keys(part)
        self.replicas = Replicas(replicas, self.keys)
        self.client = server.client(decode=True)
        # The drain's batches want answers undecoded.
        self.raw_client = server.client(decode=False)
        self._scripts = {
            name: self.client.register_script(text)
            for name, text in scripts().items()
            if name != "claim"
        }

    def run(self, name: str, keys: list[str], args: list[Any]) -> Any:
        """Run a script by its name. Raises Unavailable."""
        with asking():
            return self._scripts[name](keys=keys, args=args)

    def run_surely(self, name: str, keys: list[str], args: list[Any]) -> Any:
        """Run a script; return once replicas have what it wrote, and what it read.

        Raises Unavailable, also when too few replicas answer: then it is done all the same.
        """
        if not self.replicas.count:
            return self.run(name, keys, args)
        return self.run_all_surely([(name, keys, args)])[0]

    def run_all(self, calls: list[tuple[str, list[str], list[Any]]]) -> list[Any]:
        """Run several scripts in one round trip. Raises Unavailable."""
        with asking(), self.client.pipeline(transaction=False) as pipe:
            for name, keys, args in calls:
                self._scripts[name](keys=keys, args=args, client=pipe)
            return list(pipe.execute())

    def run_all_surely(self, calls: list[tuple[str, list[str], list[Any]]]) -> list[Any]:
        """Do as `run_all`, and return once replicas have it."""
        with asking(), self.client.pipeline(transaction=False) as pipe:
            for name, keys, args in calls:
                self._scripts[name](keys=keys, args=args, client=pipe)
            return self.replicas.run(pipe)

    def asking_script(
        self, name: str, keys: list[str], args: list[Any], read: Callable[[Any], Answer]
    ) -> Question[Answer]:
        """Return the question that a script answers."""
        return Question([self.calling(name, keys, args)], lambda answers: read(answers[0]), name)

    def calling(self, name: str, keys: list[str], args: list[Any]) -> Command:
        """Return the command that runs a script."""
        return ("EVALSHA", self._scripts[name].sha, len(keys), *keys, *args)

    def surely(self, question: Question[Answer]) -> Question[Answer]:
        """Return it with what makes sure that replicas have what was read. See run_surely."""
        if not self.replicas.count:
            return question
        fence = self.replicas.commands

        def read(answers: list[Any]) -> Answer:
            _, fenced, copied = answers[-len(fence) :]
            if fenced != 1 or not self.replicas.enough(copied):
                raise Unreplicated(copied)
            return question.read(answers[: -len(fence)])

        return Question([*question.commands, *fence], read, question.script)

    def ask(self, question: Question[Answer]) -> Answer:
        """Return what is answered. Raises Unavailable."""
        with asking():
            try:
                answers = piped(self.client, question.commands)
            except redis.exceptions.NoScriptError:
                if not question.script:
                    raise
                self.client.script_load(scripts()[question.script])
                answers = piped(self.client, question.commands)
        return question.read(answers)

    def check_replicas(self) -> None:
        """Raise Unavailable unless as many replicas as are asked for have all that there is."""
        if self.replicas.count:
            self.run_all_surely([])

    def try_write(self) -> None:
        """Find out whether Redis takes writes, without writing: only an existing key would be set.

        Refused as any write is: out of memory, out of disk, as a replica.
        """
        self.ask(self.asking_to_write())

    def asking_to_write(self) -> Question[None]:
        return Question([("SET", self.keys.nothing, "1", "XX")], lambda _: None)

    def attached_replicas(self) -> int:
        """Return how many replicas Redis has, in step or not."""
        with asking():
            return int(self.client.info("replication")["connected_slaves"])

    def server_id(self) -> str:
        """Return what tells this Redis from every other, and from itself before a restart."""
        with asking(), self.client.pipeline(transaction=False) as pipe:
            pipe.info("server")
            return str(self.replicas.run(pipe)[0]["run_id"])

    def named(self, sale: str | None) -> str:
        """Return how a script is told which sale, by its name on record, it is run for."""
        return self.part.generation(sale) if sale else ""

    def asking_generation(self) -> Question[str | None]:
        return Question(
            [("GET", self.keys.generation)], lambda held: held[0] and self.part.sale_of(held[0])
        )

    def generation(self) -> str | None:
        """Return the name of the sale that Redis holds, as on record; None when it holds none."""
        return self.ask(self.asking_generation())

    def clock(self) -> datetime:
        """Return the time by which claims are judged, in whole milliseconds, rounded down."""
        return self.ask(self.asking_clock())

    def asking_clock(self) -> Question[datetime]:
        def read(answers: list[Any]) -> datetime:
            ((seconds, microseconds),) = answers
            whole = datetime.fromtimestamp(seconds, UTC)
            return whole.replace(microsecond=microseconds // 1000 * 1000)

        return Question([("TIME",)], read)
