"""The brakes in Redis: flags beside the terms of sale, which only a brake's own act changes."""

import json
import logging
from typing import NamedTuple, cast

from ..problems import KeyMismatch, UnknownProduct
from .link import Link, asking

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


class BrakeGateway:
    """Reads and changes the brakes. Raises Unavailable when Redis can't be asked."""

    def __init__(self, link: Link) -> None:
        self._link, self._client, self._keys = link, link.client, link.keys

    def read(self) -> Brakes:
        with asking():
            return Brakes.parse(cast("str | None", self._client.get(self._keys.brakes)))

    def change(
        self, on: bool, product_id: int | None, act: dict[str, str | None], key: str | None
    ) -> tuple[int, Brakes, bool]:
        """Set or release a brake: (products it is for, brakes now in force, repeated answer?).

        `act` is told to the audit: id, actor, address. Raises UnknownProduct, and KeyMismatch when
        the Idempotency-Key was used for something else.
        """
        product = self._keys.products if product_id is None else self._keys.product(product_id)
        keys = [
            self._keys.brakes,
            self._keys.brake_acts,
            self._keys.generation,
            self._keys.products,
            product,
        ]
        if key is not None:
            keys.append(self._keys.brake_key(key))
        word = WHOLE_SALE if product_id is None else product_id
        outcome, products, text = self._link.run_surely(
            "brake", keys, [int(on), word, json.dumps(act), KEY_LIFE_MS]
        )
        if outcome == "unknown":
            raise UnknownProduct(product_id)
        if outcome == "mismatched":
            raise KeyMismatch
        return products, Brakes.parse(text), outcome == "repeated"

    def acts(self, most: int) -> list[Act]:
        """Return the oldest acts that the audit lacks; what is none is dropped."""
        acts = []
        with asking():
            for text in cast("list[str]", self._client.lrange(self._keys.brake_acts, 0, most - 1)):
                try:
                    acts.append(Act.parse(text))
                except (ValueError, KeyError, TypeError):
                    log.error("not a brake's act, dropped: %.200s", text)
                    self._client.lrem(self._keys.brake_acts, 1, text)
        return acts

    def forget(self, acts: list[Act]) -> None:
        """Take out acts that the audit has. Safe to repeat, and for two at once."""
        with asking(), self._client.pipeline(transaction=False) as pipe:
            for act in acts:
                pipe.lrem(self._keys.brake_acts, 1, act.text)
            pipe.execute()
