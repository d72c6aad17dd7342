"""The brakes in Redis: flags beside the terms of sale, which only a brake's own act changes."""

import json
import logging
from collections.abc import Iterable
from typing import Any, NamedTuple

from .link import Link, Question, asking

# How long the Idempotency-Key of a brake is remembered.
KEY_LIFE_MS = 24 * 60 * 60 * 1000

log = logging.getLogger(__name__)

WHOLE_SALE = "*"


class Brakes(NamedTuple):
    """Which brakes are set: the whole sale's, and those of single products by their ids."""

    sale: bool
    products: frozenset[int]

    def bind(self, product_id: int) -> bool:
        """Return whether purchases of this product are refused."""
        return self.sale or product_id in self.products

    @classmethod
    def parse(cls, text: str | None) -> "Brakes":
        words = (text or "").split()
        return cls(WHOLE_SALE in words, frozenset(int(word) for word in words if word.isdigit()))


class Act(NamedTuple):
    """A change of a brake that the audit is still to be told."""

    text: str  # as it stands in Redis
    act_id: str
    at_ms: int
    on: bool
    product_id: int | None
    actor: str
    address: str | None

    @classmethod
    def parse(cls, text: str) -> "Act":
        """Raises ValueError, or KeyError, when the text is no act."""
        at_ms, on, word, told = text.split(" ", 3)
        told = json.loads(told)
        product_id = None if word == WHOLE_SALE else int(word)
        return cls(
            text, told["id"], int(at_ms), on == "1", product_id, told["actor"], told["address"]
        )


class Mark(NamedTuple):
    """The newest act of a brake: the greater of two is the later one, in whichever shard."""

    at_ms: int
    act_id: str
    on: bool


class State(NamedTuple):
    """The brakes of one shard with their marks, by `*` or product id, and the shard's time."""

    marks: dict[str, Mark]
    now_ms: int
    # What was asked under the Idempotency-Key that was looked for, None where it is new.
    request: str | None


class Changed(NamedTuple):
    """What became of an act in one shard, see brake.lua."""

    outcome: str
    products: int
    brakes: Brakes


def word_of(product_id: int | None) -> str:
    """Return how a brake is named: a product's id, or `*` for the whole sale."""
    return WHOLE_SALE if product_id is None else str(product_id)


def request_of(on: bool, product_id: int | None) -> str:
    """Return what an Idempotency-Key of a brake stands for, as brake.lua keeps it."""
    return f"{int(on)} {word_of(product_id)} "


def newest(states: Iterable[State]) -> dict[str, Mark]:
    """Return the newest act of each brake in any of the shards."""
    marks: dict[str, Mark] = {}
    for state in states:
        for word, mark in state.marks.items():
            marks[word] = max(mark, marks.get(word, mark))
    return marks


class BrakeGateway:
    """Reads and changes the brakes. Raises Unavailable when Redis can't be asked."""

    def __init__(self, link: Link) -> None:
        self.link, self._client, self._keys = link, link.client, link.keys
        self.name = link.keys.brakes

    def read(self) -> Brakes:
        return self.link.ask(self.reading())

    def reading(self) -> Question[Brakes]:
        return Question([("GET", self._keys.brakes)], lambda answers: Brakes.parse(answers[0]))

    def state(self, key: str | None = None) -> State:
        """Return the brakes with their marks, and what was asked under an Idempotency-Key."""
        return self.link.ask(self.asking_state(key))

    def asking_state(self, key: str | None = None) -> Question[State]:
        kept = self._keys.nothing if key is None else self._keys.brake_key(key)
        commands = [
            ("GET", self._keys.brakes),
            ("HGETALL", self._keys.brake_marks),
            ("TIME",),
            ("GET", kept),
        ]
        return Question(commands, self._state)

    @staticmethod
    def _state(answers: list[Any]) -> State:
        brakes, marks, (seconds, microseconds), known = answers
        # One that was set by a version without marks is older than any act.
        found = {word: Mark(0, "", True) for word in (brakes or "").split()}
        for word, mark in marks.items():
            at_ms, on, act_id = mark.split(" ", 2)
            found[word] = Mark(int(at_ms), act_id, on == "1")
        request = known and known[: known.rindex(" ") + 1]
        return State(found, seconds * 1000 + microseconds // 1000, request)

    def change(
        self, word: str, mark: Mark, told: dict[str, str | None] | None, key: str | None = None
    ) -> Changed:
        """Set or release a brake, unless a later act of it is known here.

        `told` is what the audit is told, None where another shard has noted that.
        """
        product = self._keys.products if word == WHOLE_SALE else self._keys.product(int(word))
        keys = [
            self._keys.brakes,
            self._keys.brake_acts,
            self._keys.generation,
            self._keys.products,
            product,
            self._keys.brake_marks,
        ]
        if key is not None:
            keys.append(self._keys.brake_key(key))
        act = "" if told is None else json.dumps(told)
        args = [int(mark.on), word, act, KEY_LIFE_MS, mark.at_ms, mark.act_id]
        outcome, products, text = self.link.run_surely("brake", keys, args)
        return Changed(outcome, products, Brakes.parse(text))

    def forget_all(self) -> None:
        """Leave nothing of what this shard had in a sale that was dealt to it before."""
        with asking():
            self._client.delete(self._keys.brakes, self._keys.brake_marks)

    def asking_acts(self, most: int) -> Question[list[Act]]:
        """Ask for the oldest acts that the audit lacks; what is none is dropped."""
        return Question([("LRANGE", self._keys.brake_acts, 0, most - 1)], self._acts)

    def _acts(self, answers: list[Any]) -> list[Act]:
        acts = []
        for text in answers[0]:
            try:
                acts.append(Act.parse(text))
            except (ValueError, KeyError, TypeError):
                log.error("not a brake's act, dropped: %.200s", text)
                with asking():
                    self._client.lrem(self._keys.brake_acts, 1, text)
        return acts

    def forget(self, acts: list[Act]) -> None:
        """Take out acts that the audit has. Safe to repeat, and for two at once."""
        with asking(), self._client.pipeline(transaction=False) as pipe:
            for act in acts:
                pipe.lrem(self._keys.brake_acts, 1, act.text)
            pipe.execute()
