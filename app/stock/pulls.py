"""Carries out what dealing.py decides, for threads and for an event loop.

A claim that its shard could not serve waits for a pull, together with all of the process that want
as many units of the product there, and is then asked again. Nothing of it had been written.
"""

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any, NamedTuple

from ..problems import Unavailable
from .claims import DRY, Batch, Claim, Request, Tell, tell_one
from .dealing import AWAY, Answers, Ask, Pulled, Steps, ask_once, pull
from .gather import asked, gathered
from .keys import Keys
from .link import Question, scripts
from .servers import pack
from .shard import Shard

log = logging.getLogger(__name__)

# Nobody waits longer for units that others have, or may have.
MOST_SECONDS = 1.0
# Who found nothing so shortly after another need not say it to all shards again.
SEALED_SECONDS = 0.1

KEYS_OF: dict[str, Callable[[Keys, Ask], list[str]]] = {
    "scan": lambda keys, ask: [keys.generation, keys.product(ask.product_id),
                               keys.lent(ask.product_id), keys.sent],
    "take": lambda keys, ask: [keys.generation, keys.product(ask.product_id),
                               keys.lent(ask.product_id), keys.sends, keys.sent],
    "give": lambda keys, ask: [keys.generation, keys.given(ask.source),
                               keys.product(ask.product_id), keys.lent(ask.product_id)],
    "done": lambda keys, ask: [keys.generation, keys.sent],
    "sent": lambda keys, ask: [keys.generation, keys.sent],
    "seal": lambda keys, ask: [keys.generation, keys.product(ask.product_id),
                               keys.lent(ask.product_id)],
    "unseal": lambda keys, ask: [keys.product(ask.product_id), keys.lent(ask.product_id)],
}  # fmt: skip


def carry_out(shards: Sequence[Shard], steps: Steps, seconds: float = 60.0) -> Any:
    """Do what is decided, and return what it comes to; None when the time is over before."""
    deadline = time.monotonic() + seconds
    answers: Answers = []
    try:
        step = next(steps)
        while time.monotonic() < deadline:
            if isinstance(step, float):
                time.sleep(step)
            else:
                answers = _answers(shards, step)
            step = steps.send(answers)
    except StopIteration as stop:
        return stop.value
    finally:
        steps.close()
    return None


def _answers(shards: Sequence[Shard], asks: Sequence[Ask]) -> Answers:
    """Ask; together where there are several, all of which may be asked twice (a take is alone)."""
    if len(asks) == 1:
        answers = asked(asks, lambda ask: _run(shards[ask.shard], ask))
    else:
        questions = [_question(shards[ask.shard], ask) for ask in asks]
        answers = gathered([shards[ask.shard] for ask in asks], questions)
    return [None if isinstance(answer, Unavailable) else answer for answer in answers]


def _run(shard: Shard, ask: Ask) -> Any:
    run = shard.run_surely if ask.sure else shard.run
    return run(ask.script, KEYS_OF[ask.script](shard.keys, ask), list(ask.args))


def _question(shard: Shard, ask: Ask) -> Question[Any]:
    keys = KEYS_OF[ask.script](shard.keys, ask)
    question = shard.asking_script(ask.script, keys, list(ask.args), lambda answer: answer)
    return shard.surely(question) if ask.sure else question


def names_of(shards: Sequence[Shard], sale: str) -> list[str]:
    """Return how each shard names the sale that is on record as `sale`."""
    return [shard.part.generation(sale) for shard in shards]


def asked_again(request: Request, pulled: Pulled, since: float) -> Request:
    """Return what to claim after a pull; `since` is when it was first found too few, monotonic."""
    found = None if pulled.found is None else f"{pulled.found}{'' if pulled.final else AWAY}"
    return request._replace(found=found, dry_since=since)


def gathers(request: Request) -> bool:
    """Tell whether units may be lent for it: for more than one only the first time.

    Two shards that want the last five could else take them from each other for ever.
    """
    return request.quantity == 1 or not request.dry_since


NOTHING_CAME = "other shards may have units, and did not answer in time"


class ThreadPulls:
    """Pulls of a process's threads, each for itself."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._shards = shards

    def claim_again(self, shard: Shard, request: Request, dry: Claim) -> Claim:
        """Return what becomes of a claim that was dry. Raises Unavailable, as a claim does."""
        since = time.monotonic()
        while dry.outcome == DRY:
            names = names_of(self._shards, shard.part.sale_of(dry.text.decode()))
            steps = pull(
                names, shard.part.shard, request.product_id, request.quantity, gathers(request)
            )
            left = since + MOST_SECONDS - time.monotonic()
            pulled = carry_out(self._shards, steps, left)
            if pulled is None:
                raise Unavailable(NOTHING_CAME, executed=False)
            request = asked_again(request, pulled, since)
            dry = shard.thread_line.claim(request)
            if pulled.rest:
                carry_out(self._shards, ask_once(pulled.rest))
        return dry


class Want(NamedTuple):
    """What claims wait for together."""

    sale: str
    shard: int
    product_id: int
    quantity: int
    gather: bool


class LoopPulls:
    """Pulls of an event loop: one at a time for all claims that want the same."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._shards = shards
        self._waiting: defaultdict[Want, Batch] = defaultdict(list)
        self._running: dict[Want, asyncio.Task[None]] = {}
        # By sale and product: the scan under way, the one after it, and when shards were sealed.
        self._scans: dict[tuple[str, int], asyncio.Task[Answers]] = {}
        self._next_scans: dict[tuple[str, int], asyncio.Task[Answers]] = {}
        self._sealed: dict[tuple[str, int], float] = {}
        # What nobody waits for.
        self._rest: set[asyncio.Task[Any]] = set()
        for shard in shards:
            shard.loop_line.tell_dry(partial(self._wait, shard))

    def _wait(self, shard: Shard, request: Request, dry: Claim, tell: Tell) -> None:
        part = shard.part
        sale = part.sale_of(dry.text.decode())
        want = Want(sale, part.shard, request.product_id, request.quantity, gathers(request))
        since = request.dry_since or time.monotonic()
        self._waiting[want].append((request._replace(dry_since=since), tell))
        self._start(want)

    def _start(self, want: Want) -> None:
        if want in self._waiting and want not in self._running:
            self._running[want] = asyncio.create_task(self._pull(want))

    async def _pull(self, want: Want) -> None:
        # Who comes later is not told what was found before.
        waiting = self._waiting.pop(want)
        pulled = None
        try:
            names = names_of(self._shards, want.sale)
            steps = pull(names, want.shard, want.product_id, want.quantity, want.gather)
            async with asyncio.timeout(MOST_SECONDS):
                pulled = await self._carry_out(want, steps)
        except TimeoutError:
            pass
        except Exception:
            log.exception("a pull failed")
        finally:
            del self._running[want]
            self._go_on(want, waiting, pulled)
            self._start(want)

    def _go_on(self, want: Want, waiting: Batch, pulled: Pulled | None) -> None:
        if pulled and pulled.found is None:
            waiting += self._waiting.pop(want, [])
        line, latest = self._shards[want.shard].loop_line, time.monotonic() - MOST_SECONDS
        for request, tell in waiting:
            if pulled and (pulled.found is not None or request.dry_since > latest):
                line.ask(asked_again(request, pulled, request.dry_since), tell)
            elif request.dry_since > latest:
                self._waiting[want].append((request, tell))
            else:
                tell_one(tell, Unavailable(NOTHING_CAME, executed=False))
        if pulled and pulled.rest:
            self._rest.add(task := asyncio.create_task(self._asked(pulled.rest)))
            task.add_done_callback(self._rest.discard)

    async def _carry_out(self, want: Want, steps: Steps) -> Any:
        answers: Answers = []
        try:
            step = next(steps)
            while True:
                if isinstance(step, float):
                    await asyncio.sleep(step)
                elif step[0].script == "scan":
                    answers = await self._scan((want.sale, want.product_id), step)
                elif step[0].script != "seal" or self._is_to_seal((want.sale, want.product_id)):
                    answers = await self._asked(step)
                step = steps.send(answers)
        except StopIteration as stop:
            return stop.value
        finally:
            steps.close()

    async def _scan(self, of: tuple[str, int], asks: list[Ask]) -> Answers:
        """Scan, one at a time for all pulls: who comes while one is under way shares the next."""
        if of not in self._next_scans:
            scan = self._scan_after(of, asks, self._scans.get(of))
            self._next_scans[of] = asyncio.create_task(scan)
        return await asyncio.shield(self._next_scans[of])

    async def _scan_after(
        self, of: tuple[str, int], asks: list[Ask], before: "asyncio.Task[Answers] | None"
    ) -> Answers:
        if before:
            await asyncio.wait([before])
        self._scans[of] = scan = self._next_scans.pop(of)
        try:
            return await self._asked(asks)
        finally:
            if self._scans.get(of) is scan:
                del self._scans[of]

    def _is_to_seal(self, of: tuple[str, int]) -> bool:
        now = time.monotonic()
        if now < self._sealed.get(of, 0.0) + SEALED_SECONDS:
            return False
        # Of sales and products that nobody asks for any more nothing is kept.
        self._sealed = {each: at for each, at in self._sealed.items() if now < at + SEALED_SECONDS}
        self._sealed[of] = now
        return True

    async def _asked(self, asks: Sequence[Ask]) -> Answers:
        answers = await asyncio.gather(*map(self._run, asks), return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException) and not isinstance(answer, Unavailable):
                raise answer
        return [None if isinstance(answer, Unavailable) else answer for answer in answers]

    def _run(self, ask: Ask) -> Coroutine[Any, Any, Any]:
        shard = self._shards[ask.shard]
        keys = KEYS_OF[ask.script](shard.keys, ask)
        # As a whole: a node that was promoted a moment ago knows no scripts yet.
        words = ("EVAL", scripts()[ask.script], str(len(keys)), *keys, *map(str, ask.args))
        return shard.loop_line.run(pack(*words), ask.sure)
