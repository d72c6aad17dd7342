"""What goes to one shard of several, or to all of them: claims and brakes."""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple, TypeVar

from ..problems import KeyMismatch, Unavailable, UnknownProduct
from .brakes import Act, BrakeGateway, Brakes, Mark, newest, request_of, word_of
from .claims import Claim, Request, Tell
from .gather import all_of, asked, gathered, reached
from .link import Question
from .place import place
from .pulls import LoopPulls, ThreadPulls
from .shard import Shard

Answer = TypeVar("Answer")


class Pending(Unavailable):
    """A change is in force in some shards, and waits for others, by their numbers in `shards`."""

    def __init__(self, shards: tuple[int, ...], why: object) -> None:
        super().__init__(f"{in_words(shards)}: {why}")
        self.shards = shards


def in_words(shards: Sequence[int]) -> str:
    """Return shards as people are told of them, by their numbers: not empty."""
    *most, last = map(str, shards)
    return f"shards {', '.join(most)} and {last}" if most else f"shard {last}"


class ThreadLines:
    """Threads' line to each shard; a claim goes by its shopper's."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._shards = shards
        self._pulls = ThreadPulls(shards)

    def claim(self, request: Request) -> Claim:
        """Decide one purchase. Raises Unavailable when Redis gave no answer."""
        shard = self._shards[place(request.user, len(self._shards)).shard]
        return self._pulls.claim_again(shard, request, shard.thread_line.claim(request))

    def check(self) -> bool:
        """Return whether the sale was compared with PostgreSQL, by what can be reached of it.

        Raises Unavailable when a claim would find no shard able to decide it.
        """
        return _some([_tried(shard.thread_line.check) for shard in self._shards])


class LoopLines:
    """An event loop's line to each shard; a claim goes by its shopper's."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self.lines = [shard.loop_line for shard in shards]
        self.pulls = LoopPulls(shards)

    def tell_limited(self, tell: Callable[[Request, Claim], None]) -> None:
        """Have it told of users who are over their limit."""
        for line in self.lines:
            line.tell_limited(tell)

    def ask(self, request: Request, tell: Tell) -> None:
        """Decide one purchase; `tell` is called with the claim or with Unavailable, later."""
        self.lines[place(request.user, len(self.lines)).shard].ask(request, tell)

    async def check(self) -> bool:
        """Do as ThreadLines.check."""
        checks = (line.check() for line in self.lines)
        return _some(await asyncio.gather(*checks, return_exceptions=True))


def _tried(check: Callable[[], bool]) -> bool | BaseException:
    try:
        return check()
    except Unavailable as error:
        return error


def _some(answers: Sequence[bool | BaseException]) -> bool:
    """Return whether those that answered were all compared. Raises the first error of none."""
    known = [answer for answer in answers if isinstance(answer, bool)]
    if not known:
        raise next(answer for answer in answers if isinstance(answer, BaseException))
    return all(known)


class Spread(NamedTuple):
    """What an act did: for how many products, what is braked after it, a repeated answer or not.

    `pending` are the shards that it is still to be brought to.
    """

    products: int
    brakes: Brakes
    replayed: bool
    pending: tuple[int, ...] = ()


class SpreadBrakes:
    """The brakes of all shards. A brake is set where it is set in any."""

    def __init__(self, gateways: Sequence[BrakeGateway]) -> None:
        self.gateways = gateways

    def _gathered(
        self, question: Callable[[BrakeGateway], Question[Answer]]
    ) -> list[Answer | Unavailable]:
        links = [gateway.link for gateway in self.gateways]
        return gathered(links, [question(gateway) for gateway in self.gateways])

    def read(self) -> Brakes:
        """Return which are set, as far as shards can be reached. Raises Unavailable."""
        found = self._gathered(BrakeGateway.reading)
        return _union(reached(found))

    def change(
        self, on: bool, product_id: int | None, act: dict[str, str | None], key: str | None
    ) -> Spread:
        """Set or release a brake in every shard that can be reached; `agree` brings it to others.

        `act` is told to the audit: id, actor, address. Raises UnknownProduct, KeyMismatch when the
        Idempotency-Key was used for something else, and Unavailable where no shard can be reached.
        """
        # Before anything is changed: shards may know different keys, and different acts.
        found = self._gathered(lambda gateway: gateway.asking_state(key))
        states = reached(found)
        if any(state.request not in (None, request_of(on, product_id)) for state in states):
            raise KeyMismatch
        word = word_of(product_id)
        known = newest(states).get(word)
        now_ms = max(state.now_ms for state in states)
        # Later than what is known, whatever the shards' clocks say.
        mark = Mark(max(now_ms, known.at_ms + 1 if known else 0), act["id"] or "", on)
        answers = asked(self.gateways, lambda gateway: gateway.change(word, mark, act, key))
        done = {n: of for n, of in enumerate(answers) if not isinstance(of, Unavailable)}
        if any(of.outcome == "mismatched" for of in done.values()):
            raise KeyMismatch
        told = {n: of for n, of in done.items() if of.outcome != "unknown"}
        if not told:
            reached(answers)
            raise UnknownProduct(product_id)
        return Spread(
            products=max(of.products for of in told.values()),
            brakes=_union([of.brakes for of in told.values()]),
            replayed=any(of.outcome == "repeated" for of in told.values()),
            # One that lacks the product gets to know it, and the brake before that.
            pending=tuple(n for n in range(len(answers)) if n not in told),
        )

    def acts(self, most: int) -> list[Act]:
        """Return the oldest acts that the audit lacks, one by its id, from shards in reach."""
        answers = self._gathered(lambda gateway: gateway.asking_acts(most))
        found = [act for acts in reached(answers) for act in acts]
        return list({act.act_id: act for act in sorted(found, key=lambda act: act.at_ms)}.values())

    def forget(self, acts: list[Act]) -> None:
        """Take out acts that the audit has. Safe to repeat, and for two at once."""
        ids = {act.act_id for act in acts}
        theirs = self._gathered(lambda gateway: gateway.asking_acts(len(acts)))
        for gateway, found in zip(self.gateways, theirs, strict=True):
            if not isinstance(found, Unavailable):
                # Each shard has noted it by its own clock.
                gateway.forget([act for act in found if act.act_id in ids])

    def agree(self) -> None:
        """Bring each brake's newest act to the shards, of those in reach, that missed it.

        Any number of processes may do so: a shard keeps the newest that it was told.
        """
        if len(self.gateways) == 1:
            return
        states = self._gathered(BrakeGateway.asking_state)
        marks = newest(reached(states))
        for gateway, state in zip(self.gateways, states, strict=True):
            if not isinstance(state, Unavailable):
                for word, mark in marks.items():
                    if state.marks.get(word) != mark:
                        # One that was lost since then is told the next time.
                        with suppress(Unavailable):
                            gateway.change(word, mark, None)

    def remake(self, former: Sequence[BrakeGateway]) -> None:
        """Have the brakes of the shards that the sale was dealt to before. Raises Unavailable."""
        known = {gateway.name for gateway in former}
        for gateway in self.gateways:
            if gateway.name not in known:
                gateway.forget_all()
        # Of now, too: somebody may brake while a sale is made anew.
        states = all_of(asked([*former, *self.gateways], BrakeGateway.state))
        for word, mark in newest(states).items():
            for gateway in self.gateways:
                gateway.change(word, mark, None)


def _union(brakes: Sequence[Brakes]) -> Brakes:
    products = frozenset(of for each in brakes for of in each.products)
    return Brakes(any(each.sale for each in brakes), products)
