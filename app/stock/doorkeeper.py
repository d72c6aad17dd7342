"""Turns away users who are over their limit without asking Redis about each attempt.

Redis tells how long a user's window stays full, and no request in between empties it, so its answer
holds until then. It is believed for a second at most: the sale may have been reset meanwhile. A
request with an Idempotency-Key always goes to Redis, which may know its order.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Callable

from ..problems import Unavailable
from ..reading import User
from .claims import LIMITED, Claim, Request, Tell
from .loop_line import LoopLine
from .spread import LoopLines

BELIEVED_SECONDS = 1.0
# Past so many products a second, further ones are counted as unknown.
MOST_PRODUCTS = 1000
# About 15 MB. Beyond it Redis is asked.
MOST_USERS = 100_000
NO_PRODUCT = 0


class Doorkeeper:
    """Stands before an event loop's lines to Redis."""

    def __init__(self, line: LoopLine | LoopLines, count: Callable[[dict[int, int]], None]) -> None:
        """`count` is told once a second, in a thread, who was turned away: how many by product."""
        self.line = line
        line.tell_limited(self._note)
        self._count = count
        # Until when a user is turned away, and until when the window stays full, monotonic.
        self._limited: dict[User, tuple[float, float]] = {}
        self._turned_away: Counter[int] = Counter()
        self._rounds: asyncio.Task[None] | None = None

    def ask(self, request: Request, tell: Tell) -> None:
        """Decide one purchase; `tell` is called with the claim or with Unavailable, or at once."""
        user, product_id = request.user, request.product_id
        if request.key is None and user in self._limited:
            now = time.monotonic()
            believed, full = self._limited[user]
            if now < believed:
                known = product_id in self._turned_away or len(self._turned_away) < MOST_PRODUCTS
                self._turned_away[product_id if known else NO_PRODUCT] += 1
                tell(Claim(LIMITED, 0, 0, int((full - now) * 1000) + 1, b""))
                return
        self.line.ask(request, tell)

    def _note(self, request: Request, claim: Claim) -> None:
        if len(self._limited) < MOST_USERS:
            now, seconds = time.monotonic(), claim.reset_ms / 1000
            self._limited[request.user] = now + min(seconds, BELIEVED_SECONDS), now + seconds
            if self._rounds is None or self._rounds.done():
                self._rounds = asyncio.create_task(self._make_rounds())

    async def report(self) -> None:
        """Have those counted who were turned away since the last time."""
        counts, self._turned_away = self._turned_away, Counter()
        if counts:
            try:
                await asyncio.get_running_loop().run_in_executor(None, self._count, counts)
            except Unavailable:
                self._turned_away += counts

    async def _make_rounds(self) -> None:
        while self._limited or self._turned_away:
            await asyncio.sleep(BELIEVED_SECONDS)
            now = time.monotonic()
            self._limited = {user: of for user, of in self._limited.items() if of[0] > now}
            await self.report()
