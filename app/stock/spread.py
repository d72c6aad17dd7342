"""What goes to one shard of several, or to all of them: claims and brakes."""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from ..problems import Unavailable
from .brakes import Act, BrakeGateway, Brakes
from .claims import Claim, Request, Tell
from .place import place
from .pulls import LoopPulls, ThreadPulls
from .shard import Shard

Of = TypeVar("Of")
Answer = TypeVar("Answer")


def asked(parts: Iterable[Of], do: Callable[[Of], Answer]) -> list[Answer | Unavailable]:
    """Have it done in every part; return what each answered, or why it could not."""
    answers: list[Answer | Unavailable] = []
    for part in parts:
        try:
            answers.append(do(part))
        except Unavailable as error:
            answers.append(error)
    return answers


def reached(answers: Sequence[Answer | Unavailable]) -> list[Answer]:
    """Return the answers of those that could be asked. Raises Unavailable where none could."""
    found = [answer for answer in answers if not isinstance(answer, Unavailable)]
    if not found:
        all_of(answers)
    return found


def all_of(answers: Sequence[Answer | Unavailable]) -> list[Answer]:
    """Return the answers. Raises Unavailable where one could not be asked."""
    for answer in answers:
        if isinstance(answer, Unavailable):
            raise answer
    return [answer for answer in answers if not isinstance(answer, Unavailable)]


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


class SpreadBrakes:
    """The brakes of all shards. A brake is set where it is set in any."""

    def __init__(self, gateways: Sequence[BrakeGateway]) -> None:
        self._gateways = gateways

    def read(self) -> Brakes:
        """Return which are set, as far as shards can be reached. Raises Unavailable."""
        return _union(reached(asked(self._gateways, BrakeGateway.read)))

    def change(
        self, on: bool, product_id: int | None, act: dict[str, str | None], key: str | None
    ) -> tuple[int, Brakes, bool]:
        """Set or release a brake in every shard. See BrakeGateway.change.

        Raises Unavailable where one can't be reached, once all the others have it: `spread` then
        carries it there.
        """
        done, failed = [], None
        for gateway in self._gateways:
            try:
                done.append(gateway.change(on, product_id, act, key))
            except Unavailable as error:
                failed = error
        if failed:
            raise failed
        return done[0][0], _union([brakes for _, brakes, _ in done]), done[0][2]

    def acts(self, most: int) -> list[Act]:
        """Return the oldest acts that the audit lacks, one by its id, from shards in reach."""
        answers = reached(asked(self._gateways, lambda gateway: gateway.acts(most)))
        found = [act for acts in answers for act in acts]
        return list({act.act_id: act for act in sorted(found, key=lambda act: act.at_ms)}.values())

    def forget(self, acts: list[Act]) -> None:
        """Take out acts that the audit has. Safe to repeat, and for two at once."""
        ids = {act.act_id for act in acts}
        for gateway in self._gateways:
            # Each shard has noted it by its own clock.
            gateway.forget([act for act in gateway.acts(len(acts)) if act.act_id in ids])

    def agree(self, acts: list[Act]) -> None:
        """Have the newest of the acts for each brake in force in every shard.

        Raises Unavailable where one can't be reached: what it missed is not to be forgotten.
        """
        newest = {act.product_id: act for act in acts}
        all_of(asked(self._gateways, lambda gateway: self._agree(gateway, newest)))

    @staticmethod
    def _agree(gateway: BrakeGateway, newest: dict[int | None, Act]) -> None:
        brakes = gateway.read()
        for product_id, act in newest.items():
            is_set = brakes.sale if product_id is None else product_id in brakes.products
            if is_set != act.on:
                told = {"id": act.act_id, "actor": act.actor, "address": act.address}
                gateway.change(act.on, product_id, told, None)


def _union(brakes: Sequence[Brakes]) -> Brakes:
    products = frozenset(of for each in brakes for of in each.products)
    return Brakes(any(each.sale for each in brakes), products)
