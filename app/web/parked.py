"""Long polls of the feed: they wait on the event loop, and no thread waits with them.

While some wait, Redis is asked a few times a second where the feed ends. Only when that has moved,
or the time is up, is the request given to a page's thread again, which asks PostgreSQL.
"""

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from ..extensions import stock
from ..problems import Unavailable
from .request import Request

log = logging.getLogger(__name__)

# Each is a connection and some kilobytes.
MOST_PARKED = 500
LOOK_SECONDS = 0.2


@dataclass(frozen=True)
class Wait:
    """What a view asks for: to be called again when the feed goes beyond this, or it is time."""

    epoch: str
    number: int
    seconds: float


@dataclass(eq=False)
class _Parked:
    wait: Wait
    request: Request
    until: float
    over: asyncio.Future[None] = field(repr=False)


class Parking:
    """The polls that wait in this process."""

    def __init__(self) -> None:
        self._parked: set[_Parked] = set()
        self._watch: asyncio.Task[None] | None = None
        # Of its own: pages may keep theirs busy.
        self._thread = ThreadPoolExecutor(1, "feed")
        self._ending = False

    def __len__(self) -> int:
        return len(self._parked)

    async def park(self, wait: Wait, request: Request) -> bool:
        """Return when the feed has gone on, the time is up, or the client is gone.

        False, at once, when too many wait.
        """
        if self._ending:
            return True
        if len(self._parked) >= MOST_PARKED:
            return False
        loop = asyncio.get_running_loop()
        parked = _Parked(wait, request, loop.time() + wait.seconds, loop.create_future())
        self._parked.add(parked)
        if self._watch is None:
            self._watch = loop.create_task(self._look())
        try:
            await parked.over
        finally:
            self._parked.discard(parked)
        return True

    def end(self) -> None:
        """Let all go: the process is about to end."""
        self._ending = True
        for parked in self._parked:
            _let_go(parked)

    async def _look(self) -> None:
        loop = asyncio.get_running_loop()
        while self._parked:
            head = await loop.run_in_executor(self._thread, _head)
            for parked in tuple(self._parked):
                if parked.request.gone or loop.time() >= parked.until or _beyond(head, parked.wait):
                    _let_go(parked)
            await asyncio.sleep(LOOK_SECONDS)
        self._watch = None


def _head() -> tuple[str, int] | None:
    try:
        return stock.board.feed_head()
    except Unavailable:
        # Whoever waits asks PostgreSQL when the time is up.
        return None
    except Exception:
        log.exception("the feed's end can't be read")
        return None


def _beyond(head: tuple[str, int] | None, wait: Wait) -> bool:
    return head is not None and (head[0] != wait.epoch or head[1] > wait.number)


def _let_go(parked: _Parked) -> None:
    if not parked.over.done():
        parked.over.set_result(None)
